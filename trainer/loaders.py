"""The user's DataLoaders: taking one over, drawing from its samplers, and how large things are.

A loader is taken over by a copy whose batch sampler is ours (`taken_over`): nothing is made anew, so any subclass
works. Each list of indices knows its place in the epoch (`IndexList`): when it arrives in a worker, the worker's
random generators are seeded from that place, so that what it draws depends on neither ranks nor workers nor resuming.
"""

from __future__ import annotations

import copy
import hashlib
import math
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..errors import ConfigurationError, WrongTypeError
from .plan import mix_seed
from .rng import Place, arrive_at, isolated
from .signals import WorkerStart

if TYPE_CHECKING:
    from ..strategies.base import Strategy

#: One of these stands in the code of a DataLoader's __iter__ that goes on to read the batch sampler.
_READ_INDICES = {"super", "__class__", "batch_sampler", "_index_sampler", "_get_iterator", "DataLoader"}


class IndexList(list[Any]):
    """The indices of a micro-batch and its place in the epoch.

    Sent to a worker it becomes a plain list there, after the worker's generators were seeded from the place.
    """

    place: Place

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.place, list(self))


class _OnItsWay:
    """What a sampler drew that is no list (an index, a tuple), and its place: in a worker it is the index again."""

    def __init__(self, place: Place, indices: Any) -> None:
        self.place, self.indices = place, indices

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.place, self.indices)


def _arrived(place: Place, indices: Any) -> Any:
    arrive_at(place, in_worker=True)
    return indices


class IndexBatches:
    """The batch sampler of a loader that was taken over: yields the lists of indices that were put into it.

    `lists` yields (position, indices) pairs: the position in the epoch seeds what workers draw for the batch.
    `in_workers`: they are sent to workers. `drawn` counts them.
    """

    def __init__(self) -> None:
        self.lists: Iterable[tuple[int, Any]] = ()
        self.count = 0
        self.seed = self.epoch = 0
        self.in_workers = False
        self.drawn = 0

    def __iter__(self) -> Iterator[Any]:
        epoch = Place(self.seed, self.epoch, 0)
        for position, indices in self.lists:
            arrive_at(epoch, in_worker=False)
            self.drawn += 1
            if not self.in_workers:
                yield indices
                continue
            place = Place(self.seed, self.epoch, position)
            if isinstance(indices, list):
                placed = IndexList(indices)
                placed.place = place
                yield placed
            else:
                yield _OnItsWay(place, indices)

    def __len__(self) -> int:
        return self.count


def require_iterable(loader: Any, what: str) -> None:
    """WrongTypeError for `what` that is no loader."""
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise WrongTypeError(
            f"{what} is a {type(loader).__name__}, which cannot be iterated. Pass a DataLoader or any iterable of "
            "batches."
        )


def can_be_taken_over(loader: Any) -> bool:
    """True for a map-style DataLoader that would read what our batch sampler says."""
    return is_map_style(loader) and why_left_alone(loader) is None


def is_map_style(loader: Any) -> bool:
    """True for a DataLoader whose samples have indices."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def why_left_alone(loader: DataLoader[Any]) -> str | None:
    """Why a map-style loader cannot be taken over soundly; None where it can."""
    if (part := _deals_by_rank(loader)) is not None:
        return f"its {type(part).__name__} deals the samples to the ranks itself"
    owner = next(kind for kind in type(loader).__mro__ if "__iter__" in vars(kind))
    if owner is DataLoader or names_used(getattr(vars(owner)["__iter__"], "__code__", None)) & _READ_INDICES:
        return None
    return f"{owner.__name__}.__iter__ does not read the loader's batch_sampler"


def shards_itself(loader: Any) -> bool:
    """True for a map-style loader whose sampler takes this rank's share."""
    return is_map_style(loader) and _deals_by_rank(loader) is not None


def _deals_by_rank(loader: DataLoader[Any]) -> Any:
    """The sampler that does: torch's DistributedSampler, or one made in its likeness."""
    parts = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    return next((part for part in parts if hasattr(part, "num_replicas")), None)


def taken_over(loader: DataLoader[Any], indices: IndexBatches) -> DataLoader[Any]:
    """A copy of `loader`, whatever its class, that reads what `indices` says and draws from no global stream."""
    twin = copy.copy(loader)
    automatic = loader.batch_sampler is not None
    twin.__dict__["batch_sampler" if automatic else "sampler"] = indices
    twin.__dict__["generator"] = torch.Generator()
    twin.__dict__["_iterator"] = None
    indices.in_workers = loader.num_workers > 0
    if indices.in_workers:
        twin.__dict__["worker_init_fn"] = WorkerStart(loader.worker_init_fn)
    return twin


def let_go(twin: DataLoader[Any]) -> None:
    """Drop the iterator of a loader of ours: left to the garbage collector, each worker may take 5 s to end."""
    twin.__dict__["_iterator"] = None


def draws_own_batches(loader: DataLoader[Any]) -> bool:
    """True when a user's batch sampler (or, with batch_size=None, the sampler) decides what a batch is."""
    return loader.batch_size is None or not _is_of_the_library(loader.batch_sampler, "BatchSampler")


def source_of(loader: DataLoader[Any]) -> Any:
    """What draws samples, or whole batches (without automatic batching, single samples that are batches)."""
    own = draws_own_batches(loader) and loader.batch_sampler is not None
    return loader.batch_sampler if own else loader.sampler


def is_plain_shuffle(sampler: Any) -> bool:
    """True for the sampler that `shuffle=True` makes."""
    plain = _is_of_the_library(sampler, "RandomSampler")
    return plain and not sampler.replacement and sampler._num_samples is None


def _is_of_the_library(sampler: Any, name: str) -> bool:
    """True for torch's sampler of that name and for torchdata's, but for no subclass."""
    return type(sampler).__name__ == name and type(sampler).__module__.partition(".")[0] in ("torch", "torchdata")


def keeps_state_between_epochs(sampler: Any) -> bool:
    """True for a sampler that may count epochs itself or go on with a generator: nobody tells it the epoch."""
    parts = (sampler, getattr(sampler, "sampler", None))
    told = any(hasattr(part, "set_epoch") for part in parts)
    return not told and any(
        type(part).__module__.partition(".")[0] not in ("torch", "torchdata", "builtins") for part in parts
    )


def draw(sampler: Iterable[Any], seed: int, epoch: int, length: int) -> list[Any]:
    """What a user's sampler draws in `epoch`, which it was told: without touching the global streams."""
    with isolated(mix_seed(seed, epoch)), _generators_at(sampler, epoch):
        drawn = list(islice(sampler, length))
    if len(drawn) != length:
        raise ConfigurationError(
            f"{type(sampler).__name__} says that it has {length} items (its __len__), but drew {len(drawn)}. Let "
            "__len__ return what __iter__ yields."
        )
    return drawn


def draw_alike(sampler: Iterable[Any], seed: int, epoch: int, length: int, strategy: Strategy) -> list[Any]:
    """`draw` by all ranks together; ConfigurationError on each where one of them drew something else."""
    drawn = draw(sampler, seed, epoch, length)
    if strategy.world_size == 1:
        return drawn
    digests = strategy.all_gather_object(hashlib.blake2s(pickle.dumps(drawn)).hexdigest())
    other = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if other:
        raise ConfigurationError(
            f"{type(sampler).__name__} drew other samples on rank(s) {', '.join(map(str, other))} than on rank 0. A "
            "sampler must draw alike on every rank, and the trainer deals what it draws: let it draw from torch's, "
            "NumPy's or Python's global generator, which are seeded alike as it draws, or from one of its own that is. "
            "To deal the samples yourself, use Trainer(use_distributed_sampler=False)."
        )
    return drawn


@contextmanager
def _generators_at(sampler: Any, epoch: int) -> Iterator[None]:
    """Inside, a sampler's own torch generators start from their seed and the epoch, so that resuming finds them so."""
    found = [getattr(part, "generator", None) for part in (sampler, getattr(sampler, "sampler", None))]
    held = [(g, g.get_state(), g.initial_seed()) for g in found if isinstance(g, torch.Generator)]
    for generator, _, seed in held:
        generator.manual_seed(mix_seed(seed, epoch))
    try:
        yield
    finally:
        for generator, state, _ in held:
            generator.set_state(state)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell whatever wants to know it which epoch begins: loader, sampler, batch sampler, data set."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
        getattr(loader, "dataset", None),
    )
    for part in {id(part): part for part in parts}.values():
        if (told := getattr(part, "set_epoch", None)) is not None:
            told(epoch)


def has_state(part: Any) -> bool:
    """True where a loader, data set or iterator can save its position, as torchdata's protocol has it."""
    return all(callable(getattr(part, name, None)) for name in ("state_dict", "load_state_dict"))


def seed_of(loader: DataLoader[Any], seed: int) -> int:
    """The seed of the generator that the user gave the loader, if any: `DataLoader(generator=...)` stays meaningful."""
    # torchdata's RandomSampler makes a generator where the user gave none.
    made = type(loader.sampler).__module__.startswith("torchdata.")
    generator = (None if made else getattr(loader.sampler, "generator", None)) or loader.generator
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


# --- what code says of itself -------------------------------------------------------------------------------------


def names_used(what: type | CodeType | None, base: type = object) -> set[str]:
    """The names, attributes and texts in a code object, or in the methods of a class and its bases below `base`."""
    if what is None:
        return set()
    if isinstance(what, CodeType):
        inner = [const for const in what.co_consts if isinstance(const, CodeType)]
        texts = {const for const in what.co_consts if isinstance(const, str)}
        return {*what.co_names, *what.co_freevars, *texts}.union(*map(names_used, inner))
    names: set[str] = set()
    for kind in what.__mro__:
        if kind is base:
            break
        for method in vars(kind).values():
            names |= names_used(getattr(method, "__code__", None))
    return names


# --- sizes -----------------------------------------------------------------------------------------------------


def length_of(loader: Any) -> int | None:
    """How many batches `loader` says it has; None where it cannot say."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def drawn_length(loader: DataLoader[Any]) -> int:
    """How many samples, or whole batches, a map-style loader draws; ConfigurationError where nobody can say."""
    source = source_of(loader)
    length = length_of(source)
    if length is None:
        what = "batch sampler" if source is loader.batch_sampler else "sampler"
        raise ConfigurationError(
            f"The loader has no length: its {what} ({type(source).__name__}) has no __len__. Add one, or pass an "
            "iterable of batches instead of a DataLoader."
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
