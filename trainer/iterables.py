"""Iterable data sets: each item to one worker of one rank, unless the data set or its loader deals them already.

Item i of a stream belongs to shard i mod n, with ranks × workers shards. Whether a data set shards itself is read off
the names that its code uses: who asks for the worker's or the rank's number does so to take a share.

Every shard reads the whole stream, so one that shuffles itself must shuffle alike in all of them: what it draws as it
begins comes from a stream of random numbers that all have in common.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .combined import CombinedLoader
from .loaders import has_state, length_of, names_used
from .plan import mix_seed
from .rank_zero import rank_zero_info
from .rng import Place, arrive_at, seed_generators
from .signals import WorkerStart

_BY_WORKER = {"get_worker_info", "worker_info", "num_workers", "worker_id"}
_BY_RANK = {"get_rank", "get_world_size", "global_rank", "data_rank", "world_size", "rank", "RANK", "WORLD_SIZE"}
#: Libraries whose iterable data sets know about ranks and workers themselves.
_KNOWN = ("webdataset", "streaming", "torchdata")


class StartsAt(WorkerStart):
    """The first thing that a worker of a stream does: it learns its place too."""

    place = Place(0, 0, 0)

    def __call__(self, worker_id: int) -> None:
        """See WorkerStart."""
        arrive_at(self.place)
        super().__call__(worker_id)


def begin_stream(loader: Any, place: Place) -> None:
    """`sample_generator` knows the epoch in what is read of `loader` from now on; persistent workers keep their first.

    Other than those of map-style data, batches of a stream have no place of their own.
    """
    arrive_at(place)
    if isinstance(start := getattr(loader, "worker_init_fn", None), StartsAt):
        start.place = place


class ShardedDataset(IterableDataset[Any]):
    """Every n-th item of a data set; attributes are those of the data set."""

    def __init__(self, dataset: IterableDataset[Any], rank: int, ranks: int, by_worker: bool) -> None:
        self.__dict__.update(_dataset=dataset, _rank=rank, _ranks=ranks, _by_worker=by_worker)
        self.__dict__.update(_found=None, _share=None, _begun=0)

    def __iter__(self) -> Iterator[Any]:
        shard, shards = self._rank, self._ranks
        worker = get_worker_info() if self._by_worker else None
        if worker is not None:
            shard, shards = shard * worker.num_workers + worker.id, shards * worker.num_workers
            self.__dict__["_begun"] += 1  # persistent workers begin more than once
            seed_generators(mix_seed(worker.seed - worker.id, self._begun))  # not its own, but that of all workers
        skip, ended = self._found or (shard, False)
        items = iter(()) if ended else iter(self._dataset)
        share = (_StatefulShare if has_state(items) else _Share)(items, skip, shards, ended)
        self.__dict__.update(_found=None, _share=share)
        return share

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)

    def __len__(self) -> int:
        return _share_of(len(self._dataset), self._rank, self._ranks)


class StatefulShardedDataset(ShardedDataset):
    """A sharded data set whose position can be saved, because the data set's own can."""

    def state_dict(self) -> dict[str, Any]:
        """The data set's state, how many items belong to others before the next one, and whether there is a next."""
        place = None if self._share is None else [self._share.skip, self._share.ended]
        return {"dataset": self._dataset.state_dict(), "place": place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, in the next iteration."""
        self._dataset.load_state_dict(state["dataset"])
        self.__dict__["_found"] = state["place"]


class _Share:
    """Every n-th of some items; `skip` of them belong to others before the next one of this share.

    `ended`: there is none. A data set may begin anew as it sees its end, so its own state cannot tell.
    """

    def __init__(self, items: Iterator[Any], skip: int, shards: int, ended: bool) -> None:
        self._items, self.skip, self._shards, self.ended = items, skip, shards, ended

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            while self.skip:
                next(self._items)
                self.skip -= 1
            item = next(self._items)
        except StopIteration:
            self.ended = True
            raise
        self.skip = self._shards - 1
        return item


class _StatefulShare(_Share):
    def state_dict(self) -> dict[str, Any]:
        return {"items": self._items.state_dict(), "skip": self.skip}  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._items.load_state_dict(state["items"])  # type: ignore[attr-defined]
        self.skip = state["skip"]


def sharded(loader: Any, rank: int, ranks: int) -> Any:
    """`loader` (or the loaders of a collection) reading only the share of this rank and, in it, of each worker."""
    if isinstance(loader, CombinedLoader):
        return loader.map(lambda leaf: sharded(leaf, rank, ranks))
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, IterableDataset):
        return loader
    dataset = loader.dataset
    name = type(dataset).__name__
    by_rank = not deals_by_rank(loader)
    by_worker = not _deals_by_worker(loader)
    if ranks > 1 and not by_rank:
        rank_zero_info(f"{name} deals its items to the ranks itself, or so its code reads: it is left alone.")
    shards = (ranks > 1 and by_rank) or (loader.num_workers > 1 and by_worker)
    if not shards and loader.num_workers == 0:
        return loader
    twin = copy.copy(loader)
    twin.__dict__.update(_iterator=None, _IterableDataset_len_called=None)
    if loader.num_workers:
        twin.__dict__["worker_init_fn"] = StartsAt(loader.worker_init_fn)
    if not shards:
        return twin
    what = [word for word, ours in (("ranks", by_rank and ranks > 1), ("workers", by_worker)) if ours]
    rank_zero_info(f"{name} is dealt over {' and '.join(what)}, item by item.")
    kind = StatefulShardedDataset if has_state(dataset) else ShardedDataset
    twin.__dict__["dataset"] = kind(dataset, *((rank, ranks) if by_rank else (0, 1)), by_worker)
    return twin


def is_dealt_over_ranks(loader: Any) -> bool:
    """True for a loader that `sharded` returned and whose items it deals over several ranks."""
    dataset = getattr(loader, "dataset", None)
    return isinstance(dataset, ShardedDataset) and bool(dataset._ranks > 1)


def deals_by_rank(loader: Any) -> bool:
    """True when the loader's data set takes this rank's share by itself."""
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, IterableDataset):
        return False
    if hasattr(dataset, "_distributed"):  # Hugging Face's: its code can deal, and does where it was told a rank
        return dataset._distributed is not None
    return _is_known(dataset) or bool(names_used(type(dataset), IterableDataset) & _BY_RANK)


def _deals_by_worker(loader: DataLoader[Any]) -> bool:
    worker_init = getattr(loader.worker_init_fn, "__code__", None)
    names = names_used(type(loader.dataset), IterableDataset) | names_used(worker_init)
    return _is_known(loader.dataset) or bool(names & _BY_WORKER)


def _is_known(dataset: Any) -> bool:
    return type(dataset).__module__.partition(".")[0] in _KNOWN


# --- how many batches --------------------------------------------------------------------------------------------


def length_of_stream(loader: Any, drop_last_rank: bool = False) -> int | None:
    """How many batches a loader that `sharded` returned gives the rank that gets most (or least, if it ends them all).

    torch divides the items by the batch size, as if workers shared batches; None where the data set deals its items to
    several workers by a rule of its own, or says no length.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or not isinstance(dataset, IterableDataset):
        return length_of(loader)
    if not isinstance(dataset, ShardedDataset):
        return length_of(loader) if loader.num_workers <= 1 else None
    total = length_of(dataset._dataset)
    if total is None or (loader.num_workers > 1 and not dataset._by_worker):
        return None
    ranks, workers = dataset._ranks, max(loader.num_workers, 1) if dataset._by_worker else 1
    a_rank = [
        sum(_batches(loader, _share_of(total, rank * workers + worker, ranks * workers)) for worker in range(workers))
        for rank in range(ranks)
    ]
    return min(a_rank) if drop_last_rank else max(a_rank)


def _batches(loader: DataLoader[Any], items: int) -> int:
    size = loader.batch_size or 1
    return items // size if loader.drop_last else -(-items // size)


def _share_of(total: int, shard: int, shards: int) -> int:
    return total // shards + (shard < total % shards)
