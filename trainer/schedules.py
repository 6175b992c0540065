"""When, inside `fit`, learning-rate schedulers step and validation runs.

The surprise: a scheduler with a monitor waits for the metrics of the epoch (or of the step's validation), and only one
whose `step` takes a metric, as ReduceLROnPlateau's does, is given it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from .agreed_clock import AgreedClock
from .optim import SchedulerConfig
from .rank_zero import rank_zero_warn
from .state import Progress

if TYPE_CHECKING:
    from ..strategies.base import Strategy


class Schedulers:
    """The schedulers of automatic optimization.

    Those without a monitor step after an optimizer step, or at the end of an epoch before validation; those with one
    after the validation of that step, or when the epoch's metrics are ready. `metrics` gives the monitored values:
    every rank calls it at the same step.
    """

    def __init__(
        self,
        configs: Sequence[SchedulerConfig],
        step: Callable[[Any, Any], None],
        metrics: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._configs = configs
        self._step = step
        self._metrics = metrics
        self.by_step = any(c.interval == "step" and c.monitor is None for c in configs)
        self.monitored_by_step = any(c.interval == "step" and c.monitor is not None for c in configs)

    def run(self, task: str, progress: Progress) -> None:
        """Step the schedulers of one moment.

        "step" after an update and "step_monitored" after its validation; "epoch" at an epoch's end before validation
        (a second call for an epoch does nothing) and "epoch_monitored" when its metrics are ready.
        """
        interval, _, monitored = task.partition("_")
        if task == "epoch":
            if progress.epoch == progress.scheduled_epoch:
                return
            progress.scheduled_epoch = progress.epoch
        count = progress.global_step if interval == "step" else progress.epoch + 1
        due = [
            config
            for config in self._configs
            if config.interval == interval
            and (config.monitor is not None) == bool(monitored)
            and count % config.frequency == 0
        ]
        if not due:
            return
        metrics = self._metrics() if monitored else {}
        for config in due:
            if not config.reduce_on_plateau:
                self._step(config.scheduler, None)
            elif config.monitor is not None and config.monitor in metrics:
                self._step(config.scheduler, metrics[config.monitor])
            else:
                _tell_missing(config, metrics)


def _tell_missing(config: SchedulerConfig, metrics: Mapping[str, Any]) -> None:
    """The metric of a scheduler is missing: ConfigurationError under `strict`, else a warning."""
    name, logged = type(config.scheduler).__name__, ", ".join(metrics) or "none"
    if not config.strict:
        rank_zero_warn(
            f"The scheduler {name} monitors {config.monitor!r}, which is not logged; with strict=False it does not "
            f"step now. Logged are: {logged}.",
            RuntimeWarning,
        )
        return
    nearest = difflib.get_close_matches(str(config.monitor), metrics, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ConfigurationError(
        f"The scheduler {name} monitors {config.monitor!r}, which is not logged when it steps. Logged are: {logged}."
        f"{hint} Log it with self.log, choose interval and frequency such that validation has run by then, or set "
        '"strict": False to skip the step.'
    )


class ValidationTimes:
    """When validation is due inside an epoch.

    `interval` is a number of micro-batches, a fraction of the epoch, or a time since the last validation ended;
    `every_n_epochs` None counts micro-batches across epochs.
    """

    def __init__(
        self, enabled: bool, interval: int | float | timedelta, every_n_epochs: int | None, strategy: Strategy
    ) -> None:
        self._enabled = enabled
        self._strategy = strategy
        self._clock = AgreedClock(interval.total_seconds()) if isinstance(interval, timedelta) else None
        self._clock_stands = True
        self._interval = interval
        self._every_n_epochs = every_n_epochs
        self._batches: int | float = math.inf  # at the epoch's end
        self._ended = False
        self._seen = 0

    def begin_epoch(self, num_batches: int | float, progress: Progress) -> None:
        """Know the length of the coming epoch; ConfigurationError where the interval does not fit it."""
        self._seen = self._count(progress)
        self._ended = False
        if not self._enabled:
            return
        if self._clock is not None:
            self._wind_up(self._clock, progress.global_step)
            return
        assert not isinstance(self._interval, timedelta)
        if isinstance(self._interval, int):
            if self._every_n_epochs is not None and self._interval > num_batches:
                raise ConfigurationError(
                    f"val_check_interval={self._interval} is more than the {num_batches} micro-batches of an epoch. "
                    f"Use at most {num_batches}, or check_val_every_n_epoch=None to count across epochs."
                )
            self._batches = self._interval
        elif self._interval == 1.0:
            self._batches = math.inf
        elif num_batches == math.inf:
            raise ConfigurationError(
                f"val_check_interval={self._interval} is a fraction, but the training loader has no length. Use a "
                "number of micro-batches."
            )
        else:
            self._batches = max(1, int(num_batches * self._interval))

    def due(self, progress: Progress, last: bool, stopping: bool) -> bool:
        """After a window: whether validation runs now. What fell due inside the window does."""
        if not self._enabled or not self._epoch_counts(progress):
            return False
        before, self._seen = self._seen, self._count(progress)
        if stopping:
            return True
        if self._clock is not None:
            return self._time_is_up(self._clock, progress.global_step)
        if self._batches == math.inf:
            ended, self._ended = self._ended, last
            return last and not ended
        return self._seen // int(self._batches) > before // int(self._batches)

    def due_at_the_end(self, progress: Progress) -> bool:
        """At the end of the data, sooner than its length said or without one: whether validation runs now."""
        if self._clock is not None:
            return False
        validated = self._ended or progress.validated_at == progress.total_batches  # the latter: before a resume
        return self._batches == math.inf and not validated and self._epoch_counts(progress)

    def _time_is_up(self, clock: AgreedClock, step: int) -> bool:
        self._wind_up(clock, step)
        self._clock_stands = clock.is_over(step, self._strategy)
        return self._clock_stands

    def _wind_up(self, clock: AgreedClock, step: int) -> None:
        """The interval begins with the run, and again when a validation has ended."""
        if self._clock_stands:
            clock.start(step)
            self._clock_stands = False

    def _epoch_counts(self, progress: Progress) -> bool:
        return self._enabled and (self._every_n_epochs is None or (progress.epoch + 1) % self._every_n_epochs == 0)

    def _count(self, progress: Progress) -> int:
        return progress.total_batches if self._every_n_epochs is None else progress.batches_in_epoch
