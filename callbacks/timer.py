"""`Timer`: how long training, validation and tests took, and an end of training after some time."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from ..trainer.argument_types import checked_types
from ..trainer.arguments import parse_seconds
from ..trainer.callback import Callback
from ..trainer.rank_zero import rank_zero_info
from ..trainer.state import RunningStage

if TYPE_CHECKING:
    from ..trainer.module import Module
    from ..trainer.trainer import Trainer


class Timer(Callback):
    """Stops training when `duration` is over: "DD:HH:MM:SS", a timedelta, or a dict of its arguments; None: never.

    `interval` "step" looks at the clock after every batch, "epoch" at the end of epochs. The time that training took
    before a resume counts. With several ranks, the first whose time is over makes all of them stop at one agreed step.
    Stages are `"train"`, `"validate"` and `"test"`; times are those of `time.monotonic`, in seconds.
    """

    @checked_types
    def __init__(
        self,
        duration: str | timedelta | dict[str, int] | None = None,
        interval: str = "step",
        verbose: bool = True,
    ) -> None:
        self._duration = parse_seconds("duration", duration)
        if interval not in ("step", "epoch"):
            raise ConfigurationError(f"Timer(interval={interval!r}): use 'step' or 'epoch'.")
        self._interval = str(getattr(interval, "value", interval))
        self._verbose = verbose
        self._start_times: dict[str, float] = {}
        self._end_times: dict[str, float] = {}
        self._offset = 0.0

    def start_time(self, stage: str = RunningStage.TRAINING) -> float | None:
        """When `stage` last began; None: it did not."""
        return self._start_times.get(RunningStage(stage).value)

    def end_time(self, stage: str = RunningStage.TRAINING) -> float | None:
        """When `stage` last ended; None: it did not, or has begun again."""
        return self._end_times.get(RunningStage(stage).value)

    def time_elapsed(self, stage: str = RunningStage.TRAINING) -> float:
        """Seconds that `stage` has taken; those of training include the runs that this one goes on from."""
        start, end = self.start_time(stage), self.end_time(stage)
        earlier = self._offset if RunningStage(stage) is RunningStage.TRAINING else 0.0
        if start is None:
            return earlier
        return (time.monotonic() if end is None else end) - start + earlier

    def time_remaining(self, stage: str = RunningStage.TRAINING) -> float | None:
        """Seconds that are left of `duration`; None without one."""
        return None if self._duration is None else self._duration - self.time_elapsed(stage)

    # --- the clock ---------------------------------------------------------------------------------------------
    def _start(self, stage: RunningStage) -> None:
        self._start_times[stage.value] = time.monotonic()
        self._end_times.pop(stage.value, None)

    def _end(self, stage: RunningStage) -> None:
        self._end_times[stage.value] = time.monotonic()

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage == "fit":  # what an earlier fit of this object took does not count as training of this one
            self._start_times.pop("train", None)
            self._end_times.pop("train", None)

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._stop_where_due(trainer)  # a run that is resumed may have no time left

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._start(RunningStage.TRAINING)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end(RunningStage.TRAINING)

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._start(RunningStage.VALIDATING)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end(RunningStage.VALIDATING)

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._start(RunningStage.TESTING)

    def on_test_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end(RunningStage.TESTING)

    # --- the end -----------------------------------------------------------------------------------------------
    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._interval == "step":
            self._stop_where_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._interval == "epoch":
            self._stop_where_due(trainer)

    def _stop_where_due(self, trainer: Trainer) -> None:
        if self._duration is None or trainer.should_stop or self.time_elapsed() < self._duration:
            return
        trainer.should_stop = True
        if self._verbose:
            elapsed = timedelta(seconds=int(self.time_elapsed()))
            rank_zero_info(f"Time limit reached. Elapsed time is {elapsed}. Signaling Trainer to stop.")

    def state_dict(self) -> dict[str, Any]:
        return {"time_elapsed": {stage.value: self.time_elapsed(stage) for stage in RunningStage}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._offset = state_dict.get("time_elapsed", {}).get(RunningStage.TRAINING.value, 0.0)
