"""The loggers' second address: they are callbacks, and live in `paceline.callbacks`, one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["CSVLogger", "JSONLLogger", "Logger", "TensorBoardLogger", "WandbLogger"]

if TYPE_CHECKING:
    from .callbacks.csv_logger import CSVLogger
    from .callbacks.jsonl_logger import JSONLLogger
    from .callbacks.logger import Logger
    from .callbacks.tensorboard_logger import TensorBoardLogger
    from .callbacks.wandb_logger import WandbLogger
else:
    from ._lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "CSVLogger": ".callbacks.csv_logger",
            "JSONLLogger": ".callbacks.jsonl_logger",
            "Logger": ".callbacks.logger",
            "TensorBoardLogger": ".callbacks.tensorboard_logger",
            "WandbLogger": ".callbacks.wandb_logger",
        },
    )
