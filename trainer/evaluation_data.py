"""Evaluation data: the batches of one process, dealt whole, so that every sample is seen exactly once.

Batch i belongs to rank i mod n. A map-style DataLoader reads only its rank's batches; any other iterable is read by
every rank, which keeps its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import ConfigurationError
from .combined import CombinedLoader
from .iterables import begin_stream, deals_by_rank, length_of_stream, sharded
from .loaders import (
    IndexBatches,
    batch_size_of,
    can_be_taken_over,
    draw_alike,
    drawn_length,
    draws_own_batches,
    holds_loaders,
    is_map_style,
    is_plain_shuffle,
    let_go,
    require_iterable,
    resolve_limit,
    set_epoch,
    shards_itself,
    source_of,
    taken_over,
    why_left_alone,
)
from .plan import Order, permutation
from .rank_zero import rank_zero_warn
from .rng import Place, isolated

if TYPE_CHECKING:
    from ..strategies.base import Strategy


class EvaluationBatch(NamedTuple):
    """A batch of one process: `batch_idx` counts those of all ranks, `weight` are its samples.

    `indices` are those of its samples in the data set; None where the loader is no map-style DataLoader. A `ghost` is
    run only because the other ranks' forward passes need this rank's: nothing of it counts.
    """

    batch_idx: int
    batch: Any
    weight: int
    indices: Any = None
    ghost: bool = False


class EvaluationData:
    """One evaluation loader, dealt to the ranks."""

    def __init__(
        self, loader: Any, strategy: Strategy, seed: int, limit: Any, argument: str, take_over: bool = True
    ) -> None:
        require_iterable(loader, "An evaluation loader")
        self.user_loader = sharded(loader, 0, 1) if take_over else loader
        self._share = None if self.user_loader is loader or isinstance(loader, CombinedLoader) else self.user_loader
        self._strategy = strategy
        self._seed = seed
        self._indices = IndexBatches()
        self._loader = taken_over(loader, self._indices) if take_over and can_be_taken_over(loader) else None
        if self._loader is not None:
            drawn_length(loader)  # raises where it has none
        length = length_of_stream(self.user_loader)
        self.num_batches: int | float = resolve_limit(limit, math.inf if length is None else length, argument)
        if length == 0 and limit != 0:
            rank_zero_warn(f"An evaluation loader ({type(loader).__name__}) has no batch: nothing of it is evaluated.")
        self._whole = not take_over or deals_by_rank(loader) or shards_itself(loader)
        if take_over and is_map_style(loader) and self._loader is None:
            rank_zero_warn(
                f"An evaluation loader ({type(loader).__name__}) is left alone, because {why_left_alone(loader)}. So "
                "samples may be counted twice on several ranks. Pass a plain DataLoader, and the trainer deals it."
            )

    def close(self) -> None:
        """Let go of the iterators that are ours, with their workers."""
        for twin in (self._loader, self._share):
            if twin is not None:
                let_go(twin)

    def batches(self, limit: int | float = math.inf) -> Iterator[EvaluationBatch]:
        """This rank's batches among the first `limit` of all, in order."""
        count = min(self.num_batches, limit)
        if self._loader is not None:
            return self._taken_over(self._loader, self._index_lists(int(count)))
        begin_stream(self.user_loader, Place(self._seed, 0, 0))
        batches = (
            (b for b, _, _ in self.user_loader) if isinstance(self.user_loader, CombinedLoader) else self.user_loader
        )
        with isolated(self._seed):  # all ranks read all of it: a stream that shuffles itself must do so alike
            iterator = iter(batches)
            first = list(islice(iterator, 1 if count else 0))
        wanted = islice(chain(first, iterator), None if count == math.inf else int(count))
        if not self._whole:
            return self._dealt(wanted)
        own = (EvaluationBatch(index, batch, batch_size_of(batch) or 1) for index, batch in enumerate(wanted))
        return self._agreed(own) if self._strategy.evaluation_communicates else own

    def _needs_ghost(self, total: int) -> bool:
        """Whether this rank has one batch less than the first ranks, whose forward passes wait for its own."""
        rest = total % self._strategy.data_ranks
        return self._strategy.evaluation_communicates and 0 < rest <= self._strategy.data_rank

    def _dealt(self, batches: Iterable[Any]) -> Iterator[EvaluationBatch]:
        """This rank's of the batches that every rank reads."""
        rank, ranks = self._strategy.data_rank, self._strategy.data_ranks
        total, batch = 0, None
        for total, batch in enumerate(batches, 1):
            if (total - 1) % ranks == rank:
                yield EvaluationBatch(total - 1, batch, batch_size_of(batch) or 1)
        if self._needs_ghost(total):
            yield EvaluationBatch(total - 1, batch, 0, ghost=True)

    def _agreed(self, batches: Iterator[EvaluationBatch]) -> Iterator[EvaluationBatch]:
        """As many batches on every rank, where each has a loader of its own: one small message a batch."""
        last: EvaluationBatch | None = None
        while True:
            batch = next(batches, None)
            has = torch.tensor([float(batch is not None)], dtype=torch.float64)
            having = self._strategy.channel("data").gather(has).wait().sum()
            last = batch or last
            if not having:
                return
            if last is None:
                raise ConfigurationError(
                    f"An evaluation loader is empty on rank {self._strategy.rank}, the others' are not. Give every "
                    "rank at least one batch."
                )
            yield batch or last._replace(weight=0, ghost=True)

    def _taken_over(self, loader: Any, lists: list[Any]) -> Iterator[EvaluationBatch]:
        rank, ranks = self._strategy.data_rank, self._strategy.data_ranks
        mine: Sequence[int] = range(rank, len(lists), ranks)
        needs_ghost, only_ghost = self._needs_ghost(len(lists)), not mine
        if needs_ghost and only_ghost:
            mine = [0]
        self._indices.lists = ((i, list(lists[i]) if isinstance(lists[i], range) else lists[i]) for i in mine)
        self._indices.seed = self._seed
        self._indices.count = len(mine)
        loader.generator.manual_seed(self._seed)
        index, batch = 0, None
        for index, batch in zip(mine, loader, strict=True):
            if only_ghost:
                break
            size = len(lists[index]) if isinstance(lists[index], (list, tuple, range)) else batch_size_of(batch) or 1
            yield EvaluationBatch(index, batch, size, lists[index])
        if needs_ghost:
            yield EvaluationBatch(index, batch, 0, lists[index], ghost=True)

    def _index_lists(self, count: int) -> list[Any]:
        """The indices of the first `count` batches, as the user's loader would draw them."""
        loader = self.user_loader
        set_epoch(loader, 0)
        source = source_of(loader)
        if draws_own_batches(loader):
            return draw_alike(source, self._seed, 0, count, self._strategy)
        samples, size = len(source), loader.batch_size
        order: Order = range(samples)
        if is_plain_shuffle(source):
            order = permutation(samples, self._seed, 0)
        elif type(source) is not torch.utils.data.SequentialSampler:
            order = draw_alike(source, self._seed, 0, min(count * size, samples), self._strategy)
        return [order[i : i + size] for i in range(0, count * size, size)]


def evaluation_data(
    loaders: Any, strategy: Strategy, seed: int, limit: Any, argument: str, take_over: bool
) -> list[EvaluationData]:
    """One `EvaluationData` a loader; a collection's loaders come one after another."""
    if isinstance(loaders, CombinedLoader) and loaders.mode != "sequential":
        flat = [loaders]
    elif isinstance(loaders, CombinedLoader):
        flat = loaders.flattened
    elif holds_loaders(loaders):
        flat = CombinedLoader(loaders, "sequential").flattened
    else:
        flat = [loaders] if loaders != [] else []
    limits = limit if isinstance(limit, (list, tuple)) else [limit] * len(flat)
    return [
        EvaluationData(loader, strategy, seed, limit, argument, take_over)
        for loader, limit in zip(flat, limits, strict=True)
    ]
