"""What may be taken away from a run without changing a weight: one callback a file; the loggers are callbacks too."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = [
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "CSVLogger",
    "Callback",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "JSONLLogger",
    "LambdaCallback",
    "LearningRateMonitor",
    "Logger",
    "ModelCheckpoint",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "PredictionWriter",
    "Profiler",
    "ProgressBar",
    "RichProgressBar",
    "StochasticWeightAveraging",
    "TQDMProgressBar",
    "TensorBoardLogger",
    "ThroughputMonitor",
    "Timer",
    "WandbLogger",
    "WeightAveraging",
]

if TYPE_CHECKING:
    from ..trainer.callback import Callback
    from .csv_logger import CSVLogger
    from .device_stats import DeviceStatsMonitor
    from .early_stopping import EarlyStopping
    from .finetuning import BackboneFinetuning, BaseFinetuning
    from .gradient_accumulation import GradientAccumulationScheduler
    from .jsonl_logger import JSONLLogger
    from .lambda_callback import LambdaCallback
    from .logger import Logger
    from .lr_monitor import LearningRateMonitor
    from .model_checkpoint import ModelCheckpoint
    from .model_summary import ModelSummary
    from .on_exception_checkpoint import OnExceptionCheckpoint
    from .prediction_writer import PredictionWriter
    from .prediction_writer import PredictionWriter as BasePredictionWriter
    from .profiler import Profiler
    from .progress_bar import ProgressBar
    from .rich_progress_bar import RichProgressBar
    from .stochastic_weight_averaging import StochasticWeightAveraging
    from .tensorboard_logger import TensorBoardLogger
    from .throughput import ThroughputMonitor
    from .timer import Timer
    from .tqdm_progress_bar import TQDMProgressBar
    from .wandb_logger import WandbLogger
    from .weight_averaging import EMAWeightAveraging, WeightAveraging
else:
    from .._lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "BackboneFinetuning": ".finetuning",
            "BaseFinetuning": ".finetuning",
            "BasePredictionWriter": ".prediction_writer:PredictionWriter",
            "CSVLogger": ".csv_logger",
            "Callback": "..trainer.callback",
            "DeviceStatsMonitor": ".device_stats",
            "EMAWeightAveraging": ".weight_averaging",
            "EarlyStopping": ".early_stopping",
            "GradientAccumulationScheduler": ".gradient_accumulation",
            "JSONLLogger": ".jsonl_logger",
            "LambdaCallback": ".lambda_callback",
            "LearningRateMonitor": ".lr_monitor",
            "Logger": ".logger",
            "ModelCheckpoint": ".model_checkpoint",
            "ModelSummary": ".model_summary",
            "OnExceptionCheckpoint": ".on_exception_checkpoint",
            "PredictionWriter": ".prediction_writer",
            "Profiler": ".profiler",
            "ProgressBar": ".progress_bar",
            "RichProgressBar": ".rich_progress_bar",
            "StochasticWeightAveraging": ".stochastic_weight_averaging",
            "TQDMProgressBar": ".tqdm_progress_bar",
            "TensorBoardLogger": ".tensorboard_logger",
            "ThroughputMonitor": ".throughput",
            "Timer": ".timer",
            "WandbLogger": ".wandb_logger",
            "WeightAveraging": ".weight_averaging",
        },
    )
