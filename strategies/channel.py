"""`Channel`: small host-side messages between the ranks that nobody waits for.

`gather(vector)` starts at once and returns a `Message`; the loop looks later whether it has arrived. Messages of
one channel must be sent in the same order by every rank; two channels do not disturb each other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Message:
    """The vectors of all ranks, shape (world_size, n), some time after they were sent."""

    def __init__(self, rows: Tensor, work: dist.Work | None = None) -> None:
        self._rows = rows
        self._work = work

    def arrived(self) -> bool:
        """True once `wait` will not block."""
        return self._work is None or self._work.is_completed()

    def wait(self) -> Tensor:
        """The vectors of all ranks, shape (world_size, n); blocks until the slowest rank has sent its own."""
        if self._work is not None:
            self._work.wait()
        return self._rows


class Channel:
    """A way for small float64 vectors between all ranks; with one rank there is nothing to send."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None

    def gather(self, vector: Tensor) -> Message:
        """Send this rank's float64 host vector of n numbers; n must be equal on all ranks."""
        if self._group is None:
            return Message(vector[None])
        rows = torch.empty(self._world_size, len(vector), dtype=vector.dtype)
        work = dist.all_gather(list(rows.unbind()), vector, group=self._group, async_op=True)
        return Message(rows, work)

    def gather_objects(self, obj: Any) -> list[Any]:
        """The picklable objects of all ranks, by rank; waits. Safe in a thread that alone uses this channel."""
        if self._group is None:
            return [obj]
        held: list[Any] = [None] * self._world_size
        dist.all_gather_object(held, obj, group=self._group)
        return held
