"""One agreed decision: a wish of one rank becomes an order to all, at the same step.

Ranks that only waited for each other would still disagree. So wishes travel in a small message that is sent after one
window and read some windows later, on every rank after the same ones; about one message a second, and nobody waits.
With one process a wish is an order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..strategies.base import Strategy
    from ..strategies.channel import Message

_SECONDS_BETWEEN_MESSAGES = 1.0
_MOST_WINDOWS_BETWEEN = 10_000


class Wish(IntEnum):
    """What a rank may wish for; of several wishes the greatest is done."""

    NONE = 0
    SUSPEND = 1
    """Save, and end with the exit code that asks to be started again."""
    STOP = 2
    """End training, in order."""


class Control:
    """Asks all ranks, every second or so, whether any of them wishes to stop.

    `wish` tells this rank's; `agreed` is called on every rank once a stop is agreed. `suspending` is set on every rank
    after the same window once that is agreed, and acted on after the next window that ends.
    """

    def __init__(self, strategy: Strategy, wish: Callable[[], Wish], agreed: Callable[[], None]) -> None:
        self.suspending = False
        self._alone = strategy.world_size == 1
        self._channel = strategy.channel("control")
        self._wish = wish
        self._agreed = agreed
        self._message: Message | None = None
        self._interval = 1
        self._windows = 0
        self._sent_at = time.monotonic()

    def stop_agreed(self) -> bool:
        """After each window, on every rank: True on all of them, after the same window, once any wished to stop."""
        if self._alone:
            return self._decide(self._wish())
        self._windows += 1
        if self._windows < self._interval:
            return False
        now = time.monotonic()
        seconds_a_window = max((now - self._sent_at) / self._windows, 1e-6)
        stop = self._read()
        self._windows, self._sent_at = 0, now
        self._send(min(max(_SECONDS_BETWEEN_MESSAGES / seconds_a_window, 1), _MOST_WINDOWS_BETWEEN))
        return stop

    def stop_agreed_now(self) -> bool:
        """As `stop_agreed`, but waits for the answer: for the end of an epoch, where ranks meet anyway."""
        if self._alone:
            return self._decide(self._wish())
        earlier = self._read()
        self._send(1)
        now = self._read()
        self._windows = 0
        return earlier or now

    def _decide(self, wish: int) -> bool:
        if wish == Wish.STOP:
            self._agreed()
        self.suspending |= wish == Wish.SUSPEND
        return wish == Wish.STOP

    def _send(self, windows_until_read: float) -> None:
        self._message = self._channel.gather(
            torch.tensor([float(self._wish()), windows_until_read], dtype=torch.float64)
        )

    def _read(self) -> bool:
        if self._message is None:
            return False
        rows, self._message = self._message.wait(), None
        self._interval = int(rows[:, 1].max())
        return self._decide(int(rows[:, 0].max()))
