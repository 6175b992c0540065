"""Iterable data sets: each item to one worker of one rank, unless the data set or its loader deals them already.

Item i of a stream belongs to shard i mod n, with ranks × workers shards. Whether a data set shards itself is read off
the names that its code uses: who asks for the worker's or the rank's number does so to take a share.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from types import CodeType
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .combined import CombinedLoader
from .rank_zero import rank_zero_info

_BY_WORKER = {"get_worker_info", "worker_info", "num_workers", "worker_id"}
_BY_RANK = {"get_rank", "get_world_size", "global_rank", "data_rank", "world_size", "rank", "RANK", "WORLD_SIZE"}
#: Libraries whose iterable data sets know about ranks and workers themselves.
_KNOWN = ("webdataset", "streaming", "torchdata")


class ShardedDataset(IterableDataset[Any]):
    """Every n-th item of a data set; attributes are those of the data set."""

    def __init__(self, dataset: IterableDataset[Any], rank: int, ranks: int, by_worker: bool) -> None:
        self.__dict__.update(_dataset=dataset, _rank=rank, _ranks=ranks, _by_worker=by_worker)

    def __iter__(self) -> Iterator[Any]:
        shard, shards = self._rank, self._ranks
        worker = get_worker_info() if self._by_worker else None
        if worker is not None:
            shard, shards = shard * worker.num_workers + worker.id, shards * worker.num_workers
        return islice(iter(self._dataset), shard, None, shards)

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)

    def __len__(self) -> int:
        total = len(self._dataset)  # type: ignore[arg-type]
        return int(total // self._ranks + (self._rank < total % self._ranks))


def sharded(loader: Any, rank: int, ranks: int) -> Any:
    """`loader` (or the loaders of a collection) reading only the share of this rank and, in it, of each worker."""
    if isinstance(loader, CombinedLoader):
        return loader.map(lambda leaf: sharded(leaf, rank, ranks))
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, IterableDataset):
        return loader
    dataset = loader.dataset
    if type(dataset).__module__.partition(".")[0] in _KNOWN:
        return loader
    names = _names_used(dataset)
    worker_init = getattr(loader.worker_init_fn, "__code__", None)
    by_worker = not (names | (_names(worker_init) if worker_init is not None else set())) & _BY_WORKER
    by_rank = not names & _BY_RANK
    if (ranks == 1 or not by_rank) and (loader.num_workers <= 1 or not by_worker):
        return loader
    what = [word for word, ours in (("ranks", by_rank and ranks > 1), ("workers", by_worker)) if ours]
    rank_zero_info(f"{type(dataset).__name__} is dealt over {' and '.join(what)}, item by item.")
    twin = copy.copy(loader)
    share = (rank, ranks) if by_rank else (0, 1)
    twin.__dict__["dataset"] = ShardedDataset(dataset, *share, by_worker)
    twin.__dict__["_iterator"] = None
    return twin


def deals_by_rank(loader: Any) -> bool:
    """True when the loader's data set takes this rank's share by itself."""
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, IterableDataset):
        return False
    return type(dataset).__module__.partition(".")[0] in _KNOWN or bool(_names_used(dataset) & _BY_RANK)


def _names_used(dataset: IterableDataset[Any]) -> set[str]:
    """The names that the data set's own methods use."""
    names: set[str] = set()
    for kind in type(dataset).__mro__:
        if kind is IterableDataset:
            break
        for method in vars(kind).values():
            code = getattr(method, "__code__", None)
            if code is not None:
                names |= _names(code)
    return names


def _names(code: CodeType) -> set[str]:
    names = {*code.co_names, *(const for const in code.co_consts if isinstance(const, str))}
    for const in code.co_consts:
        if isinstance(const, CodeType):
            names |= _names(const)
    return names
