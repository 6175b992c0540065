"""`DeviceStatsMonitor`: what the device's memory, and where wanted the CPU, look like at the logged steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigurationError
from ..trainer.argument_types import checked_types
from ..trainer.callback import Callback
from .logger import logs_this_update, require_logger

if TYPE_CHECKING:
    from ..trainer.module import Module
    from ..trainer.trainer import Trainer


class DeviceStatsMonitor(Callback):
    """Logs the allocator's statistics of the device, and the CPU's, as `DeviceStatsMonitor.<hook>/<statistic>`.

    `cpu_stats`: None logs the CPU's when it is the device, True always, False never. They need psutil. Statistics are
    read on the host, only at steps that are logged, at a batch's start and end; of several ranks the largest is logged.
    """

    @checked_types
    def __init__(self, cpu_stats: bool | None = None) -> None:
        self._cpu_stats = cpu_stats
        self._psutil: Any = None
        self._logs_end = False

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage == "fit":
            require_logger(self, trainer)
        if self._cpu_stats or (self._cpu_stats is None and trainer.strategy.device.type == "cpu"):
            self._psutil = _import_psutil()

    def _log(self, trainer: Trainer) -> None:
        device = trainer.strategy.device
        stats = {} if device.type == "cpu" else device_stats(device)
        if self._psutil is not None:
            stats |= cpu_stats(self._psutil)
        named = {f"{type(self).__name__}.{trainer.metrics.hook}/{name}": value for name, value in stats.items()}
        if trainer.state.fn == "fit":
            self.log_dict(named, batch_size=1, reduce_fx="max")
            return
        for logger in trainer.loggers:  # these are no results of validate() and test()
            logger.log_metrics(named, trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        self._logs_end = logs_this_update(trainer)
        if self._logs_end:
            self._log(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._logs_end:
            self._log(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._log_evaluation(trainer, batch_idx)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._log_evaluation(trainer, batch_idx)

    on_test_batch_start, on_test_batch_end = on_validation_batch_start, on_validation_batch_end

    def _log_evaluation(self, trainer: Trainer, batch_idx: int) -> None:
        """Of every rank's first batch, and of some later ones: inside `fit` the largest, else those of rank 0."""
        number = batch_idx // trainer.world_size
        if number % trainer.log_every_n_steps == 0 and not trainer.sanity_checking:
            self._log(trainer)


def device_stats(device: torch.device) -> dict[str, float]:
    """What the memory allocator of an accelerator knows, in bytes and counts; waits for nothing."""
    if device.type == "mps":
        return {
            "current_allocated_bytes": torch.mps.current_allocated_memory(),
            "driver_allocated_bytes": torch.mps.driver_allocated_memory(),
        }
    return {name: value for name, value in torch.accelerator.memory_stats(device).items() if value is not None}


def cpu_stats(psutil: Any) -> dict[str, float]:
    """How much of the machine's processors, memory and swap is in use, in percent."""
    return {
        "cpu_percent": psutil.cpu_percent(),
        "cpu_vm_percent": psutil.virtual_memory().percent,
        "cpu_swap_percent": psutil.swap_memory().percent,
    }


def _import_psutil() -> Any:
    try:
        import psutil
    except ModuleNotFoundError:
        raise ConfigurationError(
            "DeviceStatsMonitor logs the CPU's statistics through psutil, which is not installed. Run "
            "`pip install psutil`, or use cpu_stats=False on an accelerator."
        ) from None
    return psutil
