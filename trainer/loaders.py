"""The user's DataLoaders: taking one over, drawing from its samplers, and how large things are.

A loader is taken over by a copy whose batch sampler is ours (`taken_over`): nothing is made anew, so any subclass
works. Each list of indices knows its place in the epoch (`IndexList`): when it arrives in a worker, the worker's
random generators are seeded from that place, so that what it draws depends on neither ranks nor workers nor resuming.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler

from ..errors import ConfigurationError
from .plan import mix_seed
from .rng import Place, arrive_at, isolated


class IndexList(list[Any]):
    """The indices of a micro-batch and its place in the epoch.

    Sent to a worker it becomes a plain list there, after the worker's generators were seeded from the place.
    """

    place: Place

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.place, list(self))


def _arrived(place: Place, indices: list[Any]) -> list[Any]:
    arrive_at(place, in_worker=True)
    return indices


class IndexBatches:
    """The batch sampler of a loader that was taken over: yields the lists of indices that were put into it.

    `lists` yields (position, indices) pairs: the position in the epoch seeds what workers draw for the batch.
    """

    def __init__(self) -> None:
        self.lists: Iterable[tuple[int, Any]] = ()
        self.count = 0
        self.seed = self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        for position, indices in self.lists:
            place = Place(self.seed, self.epoch, position)
            arrive_at(place, in_worker=False)
            if isinstance(indices, list):
                placed = IndexList(indices)
                placed.place = place
                yield placed
            else:
                yield indices

    def __len__(self) -> int:
        return self.count


def can_be_taken_over(loader: Any) -> bool:
    """True for a map-style DataLoader whose sampler does not shard by rank itself."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    return not (isinstance(sampler, DistributedSampler) or isinstance(loader.sampler, DistributedSampler))


def taken_over(loader: DataLoader[Any], indices: IndexBatches) -> DataLoader[Any]:
    """A copy of `loader`, whatever its class, that reads what `indices` says and draws from no global stream."""
    twin = copy.copy(loader)
    automatic = loader.batch_sampler is not None
    twin.__dict__["batch_sampler" if automatic else "sampler"] = indices
    twin.__dict__["generator"] = torch.Generator()
    twin.__dict__["_iterator"] = None
    return twin


def draws_own_batches(loader: DataLoader[Any]) -> bool:
    """True when a user's batch sampler (or, with batch_size=None, the sampler) decides what a batch is."""
    return loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler


def is_plain_shuffle(sampler: Any) -> bool:
    """True for the sampler that `shuffle=True` makes."""
    return type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None


def draw(sampler: Iterable[Any], seed: int, epoch: int, length: int) -> list[Any]:
    """What a user's sampler draws in `epoch`: alike on all ranks, and without touching the global streams."""
    set_epoch(sampler, epoch)
    with isolated(mix_seed(seed, epoch)):
        return list(islice(sampler, length))


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell whatever wants to know it which epoch begins: loader, sampler, batch sampler, data set."""
    for part in (
        loader,
        getattr(loader, "sampler", None),
        getattr(loader, "batch_sampler", None),
        getattr(getattr(loader, "batch_sampler", None), "sampler", None),
        getattr(loader, "dataset", None),
    ):
        if (told := getattr(part, "set_epoch", None)) is not None:
            told(epoch)


def seed_of(loader: DataLoader[Any], seed: int) -> int:
    """The seed of the generator that the user gave the loader, if any: `DataLoader(generator=...)` stays meaningful."""
    generator = getattr(loader.sampler, "generator", None) or loader.generator
    return generator.initial_seed() if isinstance(generator, torch.Generator) else seed


def holds_loaders(loaders: Any) -> bool:
    """True for a dict, list or tuple (nested ones too) of loaders; False for one of batches, or a loader itself."""
    return isinstance(loaders, (dict, list, tuple)) and any(_is_loader(leaf) for leaf in _leaves(loaders))


def _leaves(loaders: Any) -> list[Any]:
    if isinstance(loaders, dict):
        return [leaf for item in loaders.values() for leaf in _leaves(item)]
    if isinstance(loaders, (list, tuple)):
        return [leaf for item in loaders for leaf in _leaves(item)]
    return [loaders]


def _is_loader(item: Any) -> bool:
    """Whatever can be iterated, but for what batches are made of."""
    batch_like = isinstance(item, (Tensor, str, bytes, Mapping)) or hasattr(item, "__array__")
    return hasattr(item, "__iter__") and not batch_like


# --- sizes -----------------------------------------------------------------------------------------------------


def length_of(loader: Any) -> int | None:
    """How many batches `loader` says it has; None where it cannot say."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def length_or_error(sized: Any, what: str) -> int:
    """`len(sized)`; ConfigurationError where there is none, calling it `what`."""
    length = length_of(sized)
    if length is None:
        raise ConfigurationError(
            f"The loader has no length: {what} ({type(sized).__name__}) has no __len__. Add one, or pass an iterable "
            "of batches instead of a DataLoader."
        )
    return length


def resolve_limit(limit: int | float | None, length: int | float, argument: str) -> Any:
    """A number of batches: `limit` itself (an int), its fraction of `length` (a float), or all."""
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return length
    if isinstance(limit, int):
        return min(limit, length)
    if length == math.inf:
        raise ConfigurationError(
            f"{argument}={limit} is a fraction, but the loader has no length. Use a number of batches, or give the "
            "loader a __len__."
        )
    if limit and 0 < length * limit < 1:
        raise ConfigurationError(
            f"{argument}={limit} of {length} batches is less than one. Use at least {1 / length:.3g}, or a number of "
            "batches."
        )
    return int(length * limit)


def batch_size_of(batch: Any) -> int | None:
    """The first dimension of the first tensor in `batch`; else the length of its first list; None if neither."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    if isinstance(batch, (str, bytes)):
        return None
    if hasattr(batch, "values") and callable(batch.values):
        items = list(batch.values())
    elif isinstance(batch, (list, tuple)):
        items = list(batch)
    elif hasattr(batch, "__dataclass_fields__"):
        items = [getattr(batch, name) for name in batch.__dataclass_fields__]
    else:
        return None
    for item in items:
        if (size := batch_size_of(item)) is not None:
            return size
    return len(batch) if isinstance(batch, (list, tuple)) and batch else None
