"""`ThroughputMonitor`: batches, samples, items and FLOPs a second, at the logged steps.

The clock is the host's, and nothing waits for the device: the host runs ahead of it by a bounded queue, so rates over
a window of many updates are the device's. The time that validation takes inside `fit` is left out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from ..trainer.argument_types import checked_types
from ..trainer.arguments import check_count
from ..trainer.callback import Callback
from ..trainer.loaders import batch_size_of

if TYPE_CHECKING:
    from ..trainer.module import Module
    from ..trainer.trainer import Trainer


@dataclass
class Work:
    """What this rank has done since its stage began; `seconds` by the host's clock."""

    seconds: float = 0.0
    batches: int = 0
    samples: int = 0
    lengths: int = 0
    flops: float = 0.0

    def since(self, earlier: Work) -> Work:
        """What was done after `earlier`."""
        return Work(*(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True)))

    def rates(self) -> dict[str, float]:
        """By name, for what there was any of."""
        done = {"batches": self.batches, "samples": self.samples, "items": self.lengths, "flops": self.flops}
        return {f"{name}_per_sec": count / self.seconds for name, count in done.items() if count and self.seconds > 0}


class ThroughputMonitor(Callback):
    """Logs `train/device/samples_per_sec` and its like over the last `window_size` updates.

    `batch_size_fn(batch)` counts a batch's samples (default: the first tensor's first dimension), `length_fn(batch)`
    its items, as tokens; both must answer without reading from the device. `device/` rates are those of one rank (the
    mean), the others of all ranks. FLOPs need `module.flops_per_batch`, a number or a method without arguments;
    `device/mfu` is their share of `available_flops`, what a device can do in a second. Evaluations log when they end.
    """

    @checked_types
    def __init__(
        self,
        batch_size_fn: Callable[[Any], int] | None = None,
        length_fn: Callable[[Any], int] | None = None,
        available_flops: float | None = None,
        window_size: int = 100,
        separator: str = "/",
    ) -> None:
        self.batch_size_fn = batch_size_fn or (lambda batch: batch_size_of(batch) or 1)
        self.length_fn = length_fn
        self.available_flops = available_flops
        self.separator = separator
        self._window: deque[Work] = deque(maxlen=check_count("window_size", window_size) + 1)
        self._work, self._evaluation = Work(), Work()
        self._began = self._evaluation_began = 0.0
        self._seen_step = 0

    # --- training --------------------------------------------------------------------------------------------------
    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._work, self._began, self._seen_step = Work(), time.monotonic(), trainer.global_step
        self._window.clear()
        self._window.append(Work())

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._count(self._work, pl_module, batch)
        step = trainer.global_step
        if step == self._seen_step:  # inside a window of micro-batches
            return
        self._seen_step = step
        self._work.seconds = time.monotonic() - self._began
        self._window.append(Work(*astuple(self._work)))
        if step % trainer.log_every_n_steps == 0 or step == 1 or trainer.is_last_batch:
            self._log(trainer, "train", self._work, self._work.since(self._window[0]))

    # --- evaluation ------------------------------------------------------------------------------------------------
    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._evaluation, self._evaluation_began = Work(), time.monotonic()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._count(self._evaluation, pl_module, batch)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if not trainer.sanity_checking:
            self._end_evaluation(trainer, "validate")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end_evaluation(trainer, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._began += time.monotonic() - self._evaluation_began

    def _end_evaluation(self, trainer: Trainer, stage: str) -> None:
        self._evaluation.seconds = time.monotonic() - self._evaluation_began
        self._log(trainer, stage, self._evaluation, self._evaluation)

    # --- both --------------------------------------------------------------------------------------------------------
    def _count(self, work: Work, module: Module, batch: Any) -> None:
        work.batches += 1
        work.samples += self.batch_size_fn(batch)
        if self.length_fn is not None:
            work.lengths += self.length_fn(batch)
        flops: Any = getattr(module, "flops_per_batch", None)
        if flops is not None:
            work.flops += flops() if callable(flops) else flops

    def _log(self, trainer: Trainer, stage: str, total: Work, recent: Work) -> None:
        stem, device = stage + self.separator, f"{stage}{self.separator}device{self.separator}"
        for name, rate in recent.rates().items():
            self.log(device + name, rate, batch_size=1)
            if trainer.world_size > 1:
                self.log(stem + name, rate, reduce_fx="sum")
            if name == "flops_per_sec" and self.available_flops:
                self.log(f"{device}mfu", rate / self.available_flops, batch_size=1)
        self.log(f"{stem}time", total.seconds, batch_size=1)
        self.log(f"{stem}batches", total.batches, reduce_fx="sum")
        self.log(f"{stem}samples", total.samples, reduce_fx="sum")
        if self.length_fn is not None:
            self.log(f"{stem}lengths", total.lengths, reduce_fx="sum")
