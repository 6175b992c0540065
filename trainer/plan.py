"""Which rank trains which samples in which micro-batch: pure arithmetic, without data, loaders or communication.

Read it in two halves. An `Order` is an epoch's order of samples, a function of (seed, epoch) alone: a `permutation`, or
a range. An `EpochPlan` cuts the positions 0, 1, 2, ... of that order into global batches, and each of those into
micro-batches of ranks: `cut` says how. Both are read anywhere at no cost, so resuming in mid-epoch reads nothing again.

One surprising fact: a micro-batch may have weight zero. Every rank runs as many forwards as the others, so a rank that
has no sample left repeats one, which does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import ConfigurationError

_MASK_64 = 2**64 - 1
_MASK_32 = 2**32 - 1
_ORDER_STREAM = 0x6F72646572  # "order": keeps these seeds apart from those that others mix from the same seed

# Never change these: a run resumed across the change would go on in another order.
_HELD_UP_TO = 2**24  # 128 MiB and a second an epoch; longer orders are computed where they are read
_ROUNDS = 6  # from 4 on, statistics of orders up to 2**20 no longer differ from those of true permutations


# --- the order of samples --------------------------------------------------------------------------------------


def mix_seed(seed: int, *parts: int) -> int:
    """Return a seed in [0, 2**63) that shares no visible pattern with that of any other `(seed, *parts)`.

    Each number is folded in by one step of splitmix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number
    Generators", OOPSLA 2014), whose every step is a bijection of 64 bits. Numbers count modulo 2**64.
    """
    state = 0
    for number in (seed, *parts):
        state = ((state ^ number) + 0x9E3779B97F4A7C15) & _MASK_64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
        state ^= state >> 31
    return state >> 1


class Order(Protocol):
    """An epoch's order of samples: `order[start:stop]` are the indices at these positions. A range and a list are."""

    def __getitem__(self, positions: slice, /) -> Sequence[Any]: ...


def permutation(num_samples: int, seed: int, epoch: int) -> Order:
    """A random order, a function of its three arguments alone.

    Up to 2**24 samples it is `torch.randperm` with a CPU generator seeded by `mix_seed` (torch's generator uses the low
    32 bits: one pair of epochs in four billion is alike); beyond, a keyed bijection that holds nothing.
    """
    if num_samples <= _HELD_UP_TO:
        return _Held(num_samples, seed, epoch)
    return _Keyed(num_samples, seed, epoch)


class _Held:
    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        # The device is named, as a user may have set another default.
        generator = torch.Generator(device="cpu").manual_seed(mix_seed(seed, _ORDER_STREAM, epoch))
        self._indices = torch.randperm(num_samples, generator=generator, dtype=torch.int64, device="cpu")

    def __getitem__(self, positions: slice) -> list[int]:
        indices: list[int] = self._indices[positions].tolist()
        return indices


class _Keyed:
    """A Feistel network over a table that just holds all samples: a bijection that is computed where it is read.

    Each round adds a keyed hash of a cell's row to its column, or of its column to its row; both can be undone. A cell
    past the last sample is sent on until it falls on a sample: "cycle walking". Black, Rogaway: "Ciphers with Arbitrary
    Finite Domains", CT-RSA 2002.
    """

    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        assert 1 <= num_samples <= 2**62, "coordinates must fit in 32 bits, products in 63"
        self.num_samples = num_samples
        self._rows = isqrt(num_samples - 1) + 1
        self._columns = -(-num_samples // self._rows)
        self._keys = [mix_seed(seed, _ORDER_STREAM, epoch, number) & _MASK_32 for number in range(_ROUNDS)]

    def __getitem__(self, positions: slice) -> list[int]:
        places = torch.arange(*positions.indices(self.num_samples), dtype=torch.int64, device="cpu")
        cells = self._scramble(places)
        while len(outside := (cells >= self.num_samples).nonzero()):
            cells[outside] = self._scramble(cells[outside])
        indices: list[int] = cells.tolist()
        return indices

    def _scramble(self, cells: Tensor) -> Tensor:
        row = cells // self._columns
        column = cells - row * self._columns
        for row_key, column_key in zip(self._keys[::2], self._keys[1::2], strict=True):
            row = (row + _hash_32(column, row_key)) % self._rows
            column = (column + _hash_32(row, column_key)) % self._columns
        return row * self._columns + column


def _hash_32(values: Tensor, key: int) -> Tensor:
    """Mix int64 values below 2**32 into values below 2**32.

    Xor-shift-multiply with constants of https://github.com/skeeto/hash-prospector; both lie below 2**31, so that no
    product overflows int64.
    """
    values = values ^ key
    values = ((values ^ (values >> 16)) * 0x21F0AAAD) & _MASK_32
    values = ((values ^ (values >> 15)) * 0x735A2D97) & _MASK_32
    return values ^ (values >> 15)


# --- the cut of a global batch ---------------------------------------------------------------------------------


def count_micro_batches(global_batch: int, ranks: int, batch_size: int) -> int:
    """How many micro-batches of at most `batch_size` samples each rank needs for `global_batch` samples."""
    return -(-global_batch // (ranks * batch_size))


def cut(global_batch: int, ranks: int, batch_size: int) -> list[int]:
    """The sizes of the contiguous parts of a global batch: part `j * ranks + r` is micro-batch j of rank r.

    Sizes are within one of each other, the larger ones first; some are zero where there are fewer samples than parts.
    """
    parts = ranks * count_micro_batches(global_batch, ranks, batch_size)
    return [_part(global_batch, parts, number)[1] for number in range(parts)]


def _part(global_batch: int, parts: int, number: int) -> tuple[int, int]:
    """Where part `number` of `parts` starts, and its size; `number == parts` starts at the end."""
    size, larger = divmod(global_batch, parts)
    return number * size + min(number, larger), size + (number < larger)


def nearest_even(global_batch: int, batch_size: int, ranks: int) -> tuple[int, int]:
    """The greatest size up to, and the least size from, `global_batch` that is cut into equal parts."""
    assert global_batch >= ranks
    lower = global_batch // ranks
    while lower % count_micro_batches(lower, 1, batch_size):
        lower -= 1
    upper = -(-global_batch // ranks)
    while upper % count_micro_batches(upper, 1, batch_size):
        upper += 1
    return lower * ranks, upper * ranks


def told_of_cut(global_batch_size: int, batch_size: int, ranks: int) -> str:
    """What a user should be told of how a global batch is cut, "" where its parts are equal.

    Raises `ConfigurationError` where some rank would never have a sample.
    """
    who = f"{ranks} rank{'s' if ranks > 1 else ''}"
    if global_batch_size < ranks:
        fewer = f", or run on at most {global_batch_size} of them" if global_batch_size > 0 else ""
        raise ConfigurationError(
            f"global_batch_size={global_batch_size} cannot be shared by {who}: each needs a sample of every global "
            f"batch. Use {ranks} or more ({ranks * batch_size} fills batch_size={batch_size} on every rank){fewer}."
        )
    sizes = cut(global_batch_size, ranks, batch_size)
    if sizes[0] == sizes[-1]:
        return ""
    lower, upper = nearest_even(global_batch_size, batch_size, ranks)
    return (
        f"global_batch_size={global_batch_size} on {who} with batch_size={batch_size} makes unequal micro-batches of "
        f"{sizes[0]} and {sizes[-1]} samples. The gradient is exact all the same; the nearest values that make equal "
        f"ones are {lower} and {upper}."
    )


# --- the plan of an epoch --------------------------------------------------------------------------------------


class Part(NamedTuple):
    """One micro-batch: the positions from `start` up to `stop` of the epoch's order.

    `weight` is their number, or zero where one position is repeated that belongs to another micro-batch.
    """

    start: int
    stop: int
    weight: int


@dataclass(frozen=True)
class EpochPlan:
    """One rank's share of an epoch: its micro-batches, numbered by `batch_idx`, in windows of one global batch each.

    `drop_last` leaves out the last global batch where it is short. `limit_batches` counts micro-batches of one rank and
    may cut inside a window: then all ranks end it after the same micro-batch.
    """

    num_samples: int
    global_batch: int
    batch_size: int
    ranks: int = 1
    rank: int = 0
    drop_last: bool = False
    limit_batches: int | None = None

    def __post_init__(self) -> None:
        assert self.num_samples >= 0 and self.global_batch >= 1 and self.batch_size >= 1 and 0 <= self.rank < self.ranks
        assert self.limit_batches is None or self.limit_batches >= 0

    @cached_property
    def micro_batches(self) -> int:
        """How many micro-batches a full window has on each rank."""
        return count_micro_batches(self.global_batch, self.ranks, self.batch_size)

    @cached_property
    def num_batches(self) -> int:
        """How many micro-batches this rank runs in the epoch; the same number on every rank."""
        full_windows, rest = divmod(self.num_samples, self.global_batch)
        batches = full_windows * self.micro_batches
        if not self.drop_last:
            batches += count_micro_batches(rest, self.ranks, self.batch_size)
        return batches if self.limit_batches is None else min(batches, self.limit_batches)

    @cached_property
    def num_windows(self) -> int:
        """How many windows the epoch has: optimizer steps, unless some are skipped."""
        return -(-self.num_batches // self.micro_batches)

    @cached_property
    def full_windows(self) -> int:
        """How many windows, the first ones, have a full global batch and all of its micro-batches: they weigh alike."""
        return min(self.num_samples // self.global_batch, self.num_batches // self.micro_batches)

    def locate(self, batch_idx: int) -> tuple[int, int]:
        """The window of micro-batch `batch_idx`, and its place in it."""
        return divmod(batch_idx, self.micro_batches)

    def window_batches(self, window: int) -> range:
        """The `batch_idx`s of a window."""
        first = window * self.micro_batches
        return range(first, min(first + self.micro_batches, self.num_batches))

    def window(self, window: int) -> list[Part]:
        """This rank's micro-batches of a window."""
        return [self.part(batch_idx) for batch_idx in self.window_batches(window)]

    def window_span(self, window: int) -> range:
        """The positions that all ranks together train in a window: the first ones of its global batch."""
        first, size, parts = self._global_batch(window)
        trained, _ = _part(size, parts, len(self.window_batches(window)) * self.ranks)
        return range(first, first + trained)

    def part(self, batch_idx: int) -> Part:
        """This rank's micro-batch `batch_idx`."""
        assert 0 <= batch_idx < self.num_batches
        window, place = self.locate(batch_idx)
        first, size, parts = self._global_batch(window)
        offset, weight = _part(size, parts, place * self.ranks + self.rank)
        if weight == 0:
            return Part(first, first + 1, 0)
        return Part(first + offset, first + offset + weight, weight)

    def spans(self, first_batch: int) -> Iterator[tuple[int, int]]:
        """`start` and `stop` of this rank's micro-batches from `first_batch` on, which begins a window."""
        pattern = [(part.start, part.stop) for part in self.window(0)] if self.full_windows else []
        for window in range(self.locate(first_batch)[0], self.full_windows):
            first = window * self.global_batch
            for start, stop in pattern:
                yield first + start, first + stop
        for batch_idx in range(max(first_batch, self.full_windows * self.micro_batches), self.num_batches):
            part = self.part(batch_idx)
            yield part.start, part.stop

    def _global_batch(self, window: int) -> tuple[int, int, int]:
        """The first position of a window's global batch, its size before any limit, and the number of its parts."""
        assert 0 <= window < self.num_windows
        first = window * self.global_batch
        size = min(self.global_batch, self.num_samples - first)
        return first, size, self.ranks * count_micro_batches(size, self.ranks, self.batch_size)
