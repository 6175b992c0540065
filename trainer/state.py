"""The small pieces of state of a run. Counters count finished work and move in `loop.py` alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum


class _Word(str, Enum):
    def __str__(self) -> str:
        return str(self.value)


class TrainerFn(_Word):
    """Which of the four calls is under way."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"


class TrainerStatus(_Word):
    """How far the call has come."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"


class RunningStage(_Word):
    """What is being done right now: validation inside `fit` is "validate", its sanity check "sanity_check"."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"


@dataclass
class TrainerState:
    """`trainer.state`."""

    status: TrainerStatus = TrainerStatus.INITIALIZING
    fn: TrainerFn | None = None
    stage: RunningStage | None = None

    @property
    def finished(self) -> bool:
        """True after a call that ended by itself."""
        return self.status is TrainerStatus.FINISHED

    @property
    def stopped(self) -> bool:
        """True after a call that ended, by itself or not."""
        return self.status in (TrainerStatus.FINISHED, TrainerStatus.INTERRUPTED)


@dataclass
class Progress:
    """How much work is finished: counted here, moved in `loop.py` alone.

    `epoch` epochs; `batches_in_epoch` micro-batches of one rank and `windows_in_epoch` windows in the epoch under way,
    `earlier_batches` micro-batches before it; `global_step` optimizer steps; `samples` samples over all ranks; `due`
    what remains to be done after the last window, in its order (see `loop.settle`); `validated_at` how many
    micro-batches there were when validation last began, `scheduled_epoch` the epoch whose end schedulers have seen.
    """

    epoch: int = 0
    batches_in_epoch: int = 0
    windows_in_epoch: int = 0
    earlier_batches: int = 0
    global_step: int = 0
    samples: int = 0
    due: list[str] = field(default_factory=list)
    validated_at: int = -1
    scheduled_epoch: int = -1

    @property
    def total_batches(self) -> int:
        """Micro-batches of one rank in all epochs."""
        return self.earlier_batches + self.batches_in_epoch

    @property
    def cut_in_epoch(self) -> bool:
        """In a run that resumes: it was cut in the middle of an epoch, and did not stop there of itself."""
        return self.batches_in_epoch > 0 and self.due != ["stopped"]

    def end_epoch(self) -> None:
        """The epoch under way is finished."""
        self.epoch += 1
        self.earlier_batches += self.batches_in_epoch
        self.batches_in_epoch = self.windows_in_epoch = 0
        self.due = []


@dataclass
class Limits:
    """When `fit` stops; None or -1: not by this."""

    max_epochs: int | None = None
    max_steps: int = -1
    max_seconds: float | None = None
    min_epochs: int | None = None
    min_steps: int | None = None
    started: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        """`max_time` counts from now on."""
        self.started = time.monotonic()

    def reached(self, progress: Progress) -> bool:
        """`max_steps` or `max_epochs` is reached."""
        if self.max_steps != -1 and progress.global_step >= self.max_steps:
            return True
        return self.max_epochs is not None and self.max_epochs != -1 and progress.epoch >= self.max_epochs

    def time_is_up(self) -> bool:
        """`max_time` is reached, by this rank's clock."""
        return self.max_seconds is not None and time.monotonic() - self.started >= self.max_seconds

    def may_stop_early(self, progress: Progress) -> bool:
        """`min_epochs` and `min_steps` are reached."""
        return progress.epoch >= (self.min_epochs or 0) and progress.global_step >= (self.min_steps or 0)
