"""From sums on a device to numbers that all ranks share: one copy to the host, one message, no waiting in a step.

`Transfer` takes a set of named sums through three states: copied to the host, sent to the other ranks, reduced. It
polls; only `finish` waits. The message carries a hash of the names, and only where ranks logged different names are
the names gathered, by all ranks, in `finish`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..strategies.base import Strategy
    from ..strategies.channel import Message

#: What a rank without a value adds to a reduction.
NEUTRAL = {"mean": 0.0, "sum": 0.0, "min": math.inf, "max": -math.inf}


@dataclass(slots=True)
class Sum:
    """One name's share of a reduction: `value` (a host number or a 0-d tensor) of weight `weight`.

    `label` is what ranks that did not log the name must know about it.
    """

    op: str
    value: Any
    weight: float
    label: Any = None


def widen(value: Any) -> Any:
    """A copy in the widest float type of its device; host numbers are float64 already."""
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64, copy=True)


def combine(op: str, left: Any, right: Any) -> Any:
    """Two partial results of `op` as one; a "mean" is a weighted sum until its end."""
    if op in ("mean", "sum"):
        return left + right
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        device = left.device if isinstance(left, Tensor) else right.device
        pick = torch.minimum if op == "min" else torch.maximum
        return pick(torch.as_tensor(left, device=device), torch.as_tensor(right, device=device))
    return min(left, right) if op == "min" else max(left, right)


class HostCopy:
    """Numbers on their way to the host: one stacked copy a device, through pinned memory where there is a GPU."""

    def __init__(self, values: Sequence[Any]) -> None:
        self._numbers = [0.0 if isinstance(v, Tensor) else float(v) for v in values]
        self._parts: list[tuple[list[int], Tensor]] = []
        self._events: list[torch.cuda.Event] = []
        by_device: dict[torch.device, list[int]] = {}
        for index, value in enumerate(values):
            if isinstance(value, Tensor):
                by_device.setdefault(value.device, []).append(index)
        for device, indices in by_device.items():
            stacked = torch.stack([widen(values[i]) for i in indices])
            if device.type == "cuda":
                pinned = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
                stacked = pinned.copy_(stacked, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
                self._events.append(event)
            self._parts.append((indices, stacked))

    def arrived(self) -> bool:
        """True once `wait` will not block."""
        return all(event.query() for event in self._events)

    def wait(self) -> list[float]:
        """The numbers, in the order in which the values were given."""
        for event in self._events:
            event.synchronize()
        for indices, stacked in self._parts:
            for index, number in zip(indices, stacked.tolist(), strict=True):
                self._numbers[index] = number
        return self._numbers


class Capacity:
    """How many numbers a message holds: what all ranks have seen to be needed so far, so equal on all of them."""

    def __init__(self) -> None:
        self.numbers = 0


class Transfer:
    """Named sums of this rank on their way to being everyone's; `labels` are all ranks' once it has finished."""

    def __init__(self, sums: Mapping[str, Sum], strategy: Strategy, capacity: Capacity) -> None:
        self._names = sorted(sums)
        self._sums = sums
        self._strategy = strategy
        self._capacity = capacity
        self.labels = {name: share.label for name, share in sums.items()}
        self._copy = HostCopy([sums[name].value for name in self._names])
        self._values: list[float] | None = None
        self._message: Message | None = None

    def arrived(self) -> bool:
        """True once `finish` will not block: sends the message as soon as the copy has come. Never blocks."""
        if self._values is None:
            if not self._copy.arrived():
                return False
            self._values = self._copy.wait()
        if self._strategy.world_size == 1:
            return True
        if self._message is None:
            self._send(self._values)
        assert self._message is not None
        return self._message.arrived() and self._names_alike(self._message.wait())

    def finish(self) -> dict[str, float]:
        """The numbers of all ranks, reduced; every rank calls it for its transfers in the same order."""
        if self._values is None:
            self._values = self._copy.wait()
        mine = {
            name: (self._sums[name].op, value, self._sums[name].weight)
            for name, value in zip(self._names, self._values, strict=True)
        }
        if self._strategy.world_size == 1:
            return reduce([mine])
        if self._message is None:
            self._send(self._values)
        assert self._message is not None
        rows = self._message.wait()
        alike = self._names_alike(rows)
        self._capacity.numbers = max(self._capacity.numbers, int(rows[:, 1].max()))
        if not alike:
            shares = self._strategy.all_gather_object((mine, self.labels))
            self.labels = {name: label for _, labels in reversed(shares) for name, label in labels.items()}
            return reduce([share for share, _ in shares])
        count = len(self._names)
        return reduce(
            [
                {name: (mine[name][0], row[2 + i], row[2 + count + i]) for i, name in enumerate(self._names)}
                for row in rows.tolist()
            ]
        )

    def _send(self, values: list[float]) -> None:
        numbers = [*values, *(self._sums[name].weight for name in self._names)]
        room = self._capacity.numbers
        body = numbers[:room] + [0.0] * (room - len(numbers))
        header = [self._fingerprint(), float(len(numbers))]
        self._message = self._strategy.channel("metrics").gather(torch.tensor(header + body, dtype=torch.float64))

    def _fingerprint(self) -> float:
        """A 48-bit hash of names and operations, exact as a float64."""
        text = "\n".join(f"{name}:{self._sums[name].op}" for name in self._names)
        return float(int.from_bytes(hashlib.blake2s(text.encode(), digest_size=6).digest(), "big"))

    def _names_alike(self, rows: Tensor) -> bool:
        """All ranks sent the same names, and all their numbers fitted."""
        room = rows.shape[1] - 2
        return bool((rows[:, :2] == rows[0, :2]).all()) and int(rows[0, 1]) <= room


def reduce(per_rank: Sequence[Mapping[str, tuple[str, float, float]]]) -> dict[str, float]:
    """(operation, value, weight) of every rank and name → one number a name; absent names weigh nothing."""
    merged: dict[str, tuple[str, float, float]] = {}
    for share in per_rank:
        for name, (op, value, weight) in share.items():
            if name not in merged:
                merged[name] = (op, value, weight)
            else:
                _, before, weight_before = merged[name]
                merged[name] = (op, combine(op, before, value), weight_before + weight)
    return {
        name: (value / weight if weight else math.nan) if op == "mean" else value
        for name, (op, value, weight) in merged.items()
    }
