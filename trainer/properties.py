"""What user code reads of a trainer. Reading never communicates, and works before, in and after a call."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .arguments import check_count
from .optim import estimated_stepping_batches
from .state import Progress, RunningStage, TrainerFn, TrainerState, TrainerStatus

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    from ..strategies.base import Strategy
    from .arguments import Arguments
    from .callback import Callback
    from .data import PlannedData
    from .evaluate import Evaluation
    from .loop import Fit
    from .metrics import Metrics
    from .module import Module
    from .streamed_data import StreamedData
    from .windows import DataSettings


def _reading(path: str) -> Any:
    return property(attrgetter(path))


def _batches(stage: str) -> Any:
    return property(lambda trainer: trainer.batch_counts.get(stage, []))


def _in_stage(*stages: RunningStage) -> Any:
    return property(lambda trainer: trainer.state.stage in stages)


def _callbacks_with(attribute: str) -> Any:
    return property(lambda trainer: [callback for callback in trainer.callbacks if hasattr(callback, attribute)])


def _first_with(attribute: str) -> Any:
    return property(lambda trainer: next((cb for cb in trainer.callbacks if hasattr(cb, attribute)), None))


def _limit(stage: str) -> Any:
    def limit(trainer: TrainerProperties) -> int | float:
        given = trainer.arguments.limit_of(stage)
        return 1.0 if given is None else given

    return property(limit)


class TrainerProperties:
    """The read-only half of `Trainer`."""

    arguments: Arguments
    batch_counts: dict[str, list[int | float]]
    callbacks: list[Callback]
    chosen_seed: tuple[int, bool] | None
    data_settings: DataSettings | None
    evaluation: Evaluation | None
    fit_run: Fit | None
    load_train_data: Callable[[], PlannedData | StreamedData]
    metrics: Metrics
    module: Module | None
    precision_policy: Any
    progress: Progress
    run_folder: str | None
    set_callbacks: Callable[[list[Callback]], None]
    state: TrainerState
    train_data: PlannedData | StreamedData | None
    strategy: Strategy
    validation: Evaluation | None
    _choice: Any

    # --- how far ----------------------------------------------------------------------------------------------
    current_epoch: int = _reading("progress.epoch")  # epochs finished: inside one, its number from 0
    global_step: int = _reading("progress.global_step")  # optimizer steps finished: one a window, of all optimizers
    samples_seen: int = _reading("progress.samples")  # over all ranks

    @property
    def is_last_batch(self) -> bool:
        """Whether the batch under way is the epoch's last, where that is known."""
        return self.fit_run is not None and self.fit_run.batch_idx + 1 >= self.fit_run.num_batches

    @property
    def num_training_batches(self) -> int | float:
        """Micro-batches of one rank in an epoch; inf where the loader has no length, or nobody knows it yet."""
        return math.inf if self.train_data is None else self.train_data.num_batches

    num_val_batches: list[int | float] = _batches("validation")  # of each loader, over all ranks
    num_test_batches: list[int | float] = _batches("test")
    num_predict_batches: list[int | float] = _batches("predict")

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        """Batches of each validation loader in the sanity check."""
        return [min(count, self.num_sanity_val_steps) for count in self.num_val_batches]

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps that `fit` will take, as far as is known. From `setup` on it asks for the training loader."""
        limits = self.arguments
        if self.data_settings is None:
            return math.inf if limits.max_steps == -1 else limits.max_steps
        data = self.load_train_data()
        steps = estimated_stepping_batches(limits.max_epochs, limits.max_steps, data.num_batches, data.micro_batches)
        for callback in self.callbacks:
            if hasattr(callback, "estimated_steps"):  # the accumulation is another in other epochs
                steps = callback.estimated_steps(limits.max_epochs, limits.max_steps, data.num_batches, steps)
        return steps

    @property
    def accumulate_grad_batches(self) -> int:
        """Micro-batches of a rank in a window. While `fit` runs, what is set counts from the next epoch on."""
        settings = self._settings_of_fit
        return self.arguments.accumulate_grad_batches if settings is None else settings.accumulate

    @accumulate_grad_batches.setter
    def accumulate_grad_batches(self, factor: int) -> None:
        check_count("accumulate_grad_batches", factor)
        if self.arguments.global_batch_size is not None:
            raise ConfigurationError(
                f"accumulate_grad_batches={factor} contradicts global_batch_size={self.arguments.global_batch_size}, "
                "from which it is derived. Leave global_batch_size out."
            )
        settings = self._settings_of_fit
        if settings is None:
            self.arguments.accumulate_grad_batches = factor
            return
        if settings.global_batch_size is not None:  # kept from a run on another number of ranks
            settings.global_batch_size = settings.global_batch_size // settings.accumulate * factor
        settings.accumulate = factor

    @property
    def _settings_of_fit(self) -> DataSettings | None:
        running = self.state.status is TrainerStatus.RUNNING and self.state.fn is TrainerFn.FITTING
        return self.data_settings if running else None

    # --- arguments, as given (limits: 1.0 for all batches) ------------------------------------------------------
    max_epochs: int | None = _reading("arguments.max_epochs")
    max_steps: int = _reading("arguments.max_steps")
    min_epochs: int | None = _reading("arguments.min_epochs")
    min_steps: int | None = _reading("arguments.min_steps")
    overfit_batches: int | float = _reading("arguments.overfit_batches")
    val_check_interval: int | float | timedelta = _reading("arguments.val_check_interval")
    check_val_every_n_epoch: int | None = _reading("arguments.check_val_every_n_epoch")
    gradient_clip_val: float | None = _reading("arguments.gradient_clip_val")
    log_every_n_steps: int = _reading("arguments.log_every_n_steps")
    reload_dataloaders_every_n_epochs: int = _reading("arguments.reload_dataloaders_every_n_epochs")
    default_root_dir: str = _reading("arguments.default_root_dir")
    barebones: bool = _reading("arguments.barebones")
    limit_train_batches: int | float = _limit("train")
    limit_val_batches: int | float = _limit("val")
    limit_test_batches: int | float = _limit("test")
    limit_predict_batches: int | float = _limit("predict")

    @property
    def fast_dev_run(self) -> int | bool:
        """The number of batches; False when off."""
        return self.arguments.fast_dev_run or False

    @property
    def num_sanity_val_steps(self) -> int | float:
        """As given; inf for -1."""
        steps = 0 if self.arguments.fast_dev_run else self.arguments.num_sanity_val_steps
        return math.inf if steps == -1 else steps

    @property
    def gradient_clip_algorithm(self) -> str:
        """As given."""
        return self.arguments.gradient_clip_algorithm or "norm"

    @property
    def log_dir(self) -> str:
        """The folder of this run; the root until one is claimed."""
        return self.run_folder or self.default_root_dir

    # --- metrics ----------------------------------------------------------------------------------------------
    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """All that was logged, as 0-d tensors: reduced values, and this rank's newest of step metrics since then."""
        return self.metrics.callback_metrics()

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """What went to the loggers."""
        return self.metrics.logged_metrics()

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """What the bar shows; never reads from the device."""
        return self.metrics.progress_bar_metrics()

    # --- what is being done -----------------------------------------------------------------------------------
    training: bool = _in_stage(RunningStage.TRAINING)
    validating: bool = _in_stage(RunningStage.VALIDATING)  # in `validate` or inside `fit`
    testing: bool = _in_stage(RunningStage.TESTING)
    predicting: bool = _in_stage(RunningStage.PREDICTING)
    sanity_checking: bool = _in_stage(RunningStage.SANITY_CHECKING)  # validation before training
    evaluating: bool = _in_stage(RunningStage.VALIDATING, RunningStage.TESTING, RunningStage.SANITY_CHECKING)

    @property
    def interrupted(self) -> bool:
        """The last call ended with an exception."""
        return self.state.status is TrainerStatus.INTERRUPTED

    # --- where ------------------------------------------------------------------------------------------------
    global_rank: int = _reading("strategy.rank")  # this process among all
    local_rank: int = _reading("strategy.local_rank")  # on its node
    node_rank: int = _reading("strategy.node_rank")
    is_global_zero: bool = _reading("strategy.is_global_zero")  # the one process that prints, draws and writes
    num_nodes: int = _reading("_choice.num_nodes")  # of the job
    num_devices: int = _reading("_choice.ranks_here")  # ranks on this node
    precision: str = _reading("precision_policy.name")  # its full name
    scaler: torch.amp.GradScaler | None = _reading("strategy.scaler")  # of the loss, under 16-mixed

    @property
    def world_size(self) -> int:
        """Processes of the job: those that run, or will be started."""
        return max(self.strategy.world_size, int(self._choice.ranks_here * self._choice.num_nodes))

    @property
    def device_ids(self) -> list[int]:
        """Indices of the devices on this node."""
        return [device.index or 0 for device in self._choice.devices]

    @property
    def seed(self) -> int:
        """The seed that order, workers and ranks' streams come from."""
        return 0 if self.chosen_seed is None else self.chosen_seed[0]

    # --- what takes part ----------------------------------------------------------------------------------------
    model: Module | None = _reading("module")  # as the user made it
    lightning_module: Any = _reading("module")  # the same

    @property
    def loggers(self) -> list[Any]:
        """The callbacks that are loggers."""
        return [callback for callback in self.callbacks if hasattr(callback, "log_metrics")]

    @loggers.setter
    def loggers(self, loggers: list[Any]) -> None:
        others = [callback for callback in self.callbacks if callback not in self.loggers]
        self.set_callbacks([*others, *loggers])

    @property
    def logger(self) -> Any:
        """The first logger, or None. Another one put in its place takes the place of all."""
        return next(iter(self.loggers), None)

    @logger.setter
    def logger(self, logger: Any) -> None:
        self.loggers = [] if logger is None else [logger]

    checkpoint_callbacks: list[Any] = _callbacks_with("best_model_path")
    checkpoint_callback: Any = _first_with("best_model_path")
    early_stopping_callbacks: list[Any] = _callbacks_with("stopped_epoch")
    early_stopping_callback: Any = _first_with("stopped_epoch")
    profiler: Any = _first_with("trace_paths")
    progress_bar_callback: Any = _first_with("get_metrics")

    @property
    def enable_validation(self) -> bool:
        """Whether `fit` validates."""
        return self.validation is not None
