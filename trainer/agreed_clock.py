"""`AgreedClock`: an interval of time is over at the same step on every rank, though their clocks differ.

Rank 0's clock decides. Asking it at every step would cost a broadcast a step; how fast the steps are tells when asking
again makes sense: after half of the steps that seem to be left, and never more than have been seen.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..strategies.base import Strategy


class AgreedClock:
    """Call `start` once, then `is_over` with every step; both on every rank."""

    def __init__(self, interval_seconds: float) -> None:
        self.interval_seconds = interval_seconds
        self.start(0)

    def start(self, step: int) -> None:
        """The interval begins after update `step`."""
        self._first_step, self._started = step, time.monotonic()
        self._next_question = step + 1

    def is_over(self, step: int, strategy: Strategy) -> bool:
        """Whether the interval is over after update `step`; then the next one begins."""
        if step < self._next_question:
            return False
        elapsed = strategy.broadcast_object(time.monotonic() - self._started)
        if elapsed >= self.interval_seconds:
            self.start(step)
            return True
        self._next_question = step + steps_to_wait(elapsed, step - self._first_step, self.interval_seconds)
        return False


def steps_to_wait(elapsed: float, steps: int, interval: float) -> int:
    """Half of the steps that are left of `interval` at the speed of the first `steps`, at least 1, at most `steps`."""
    left = (interval - elapsed) * steps / elapsed if elapsed > 0 else steps
    return max(1, min(int(left / 2), steps))
