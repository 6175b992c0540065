"""A data set's fingerprint: its type, its length and the content of three samples.

Every rank must see the same data, or ranks would train different samples under the same numbers; and a resumed run
must find what it was saved with.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..errors import ConfigurationError
from .iterables import deals_by_rank
from .loaders import IndexBatches, can_be_taken_over, length_of
from .rng import isolated, place_kept, seed_generators
from .signals import WorkerStart

if TYPE_CHECKING:
    from ..strategies.base import Strategy


def fingerprint(loader: Any) -> dict[str, Any]:
    """What to compare of a loader; reads three samples of map-style data without moving the random streams."""
    loader = getattr(loader, "user_loader", loader)
    facts: dict[str, Any] = {"loader": type(loader).__qualname__}
    if can_be_taken_over(loader):
        facts |= {"batch_size": loader.batch_size, **_content(loader.dataset, loader)}
    elif isinstance(loader, Sequence):
        facts |= _content(loader)
    elif isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        facts["data set"] = type(loader.dataset).__qualname__
        if not deals_by_rank(loader):
            facts["length"] = length_of(loader.dataset)
    return facts


def _content(dataset: Any, loader: Any = None) -> dict[str, Any]:
    """The length comes first: where it differs, samples do too."""
    length = length_of(dataset)
    facts: dict[str, Any] = {"data set": type(dataset).__qualname__, "length": length}
    if length:
        indices = sorted({0, length // 2, length - 1})
        facts |= zip((f"sample {index}" for index in indices), _digests(dataset, indices, loader), strict=True)
    return facts


def _digests(dataset: Any, indices: list[int], loader: Any) -> list[str | None]:
    """A hash of each sample; None where it is another each time, or samples cannot be read or written one by one.

    A loader with workers has them read by one: a file that a data set opens at its first sample, kept open here, would
    be shared by all workers, and with it the place in the file.
    """

    def twice() -> Iterator[tuple[int, int]]:
        for index in indices:
            for _ in range(2):
                seed_generators(0)
                yield 0, index

    reads = IndexBatches()
    reads.lists, reads.in_workers = twice(), getattr(loader, "num_workers", 0) > 0
    reader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,
        sampler=reads,
        collate_fn=_hash,
        num_workers=int(reads.in_workers),
        worker_init_fn=WorkerStart(loader.worker_init_fn) if reads.in_workers else None,
        multiprocessing_context=loader.multiprocessing_context if reads.in_workers else None,
        generator=torch.Generator(),
    )
    try:
        with isolated(), place_kept():
            found = list(reader)
    except (pickle.PicklingError, AttributeError, TypeError, LookupError):  # an index may be a key of a sampler
        return [None] * len(indices)
    return [first if first == again else None for first, again in zip(found[::2], found[1::2], strict=True)]


def _hash(sample: Any) -> str:
    written = io.BytesIO()
    _Writer(written).dump(sample)  # never read back
    return hashlib.blake2s(written.getvalue(), digest_size=8).hexdigest()


class _Writer(pickle.Pickler):
    """Writes the numbers of a tensor, not all of the memory that it is a view of."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor) or obj.is_sparse or obj.is_quantized:
            return None
        written = io.BytesIO()
        torch.save(obj.detach().clone(memory_format=torch.contiguous_format), written)
        return "tensor", written.getvalue()


def check_alike(stage: str, loaders: Sequence[Any], strategy: Strategy) -> None:
    """ConfigurationError on every rank when the data of one differs from rank 0's; a collective."""
    if strategy.world_size == 1:
        return
    leaves = [leaf for loader in loaders for leaf in (getattr(loader, "flattened", None) or [loader])]
    found = strategy.all_gather_object([fingerprint(getattr(leaf, "planned", leaf)) for leaf in leaves])
    for rank, theirs in enumerate(found):
        if len(theirs) != len(found[0]):
            _refuse(stage, rank, "number of loaders", len(theirs), len(found[0]))
        for expected, facts in zip(found[0], theirs, strict=True):
            for name, value in expected.items():
                if name not in facts or (facts[name] != value and None not in (facts[name], value)):
                    _refuse(stage, rank, name, facts.get(name), value)


def _refuse(stage: str, rank: int, name: str, found: Any, expected: Any) -> None:
    raise ConfigurationError(
        f"The {stage} data of rank {rank} is not that of rank 0: {name} {found!r}, expected {expected!r}. Every rank "
        "must make the same data set, and the trainer deals it: call seed_everything() before data is drawn or split "
        "at random. To shard it yourself, use Trainer(use_distributed_sampler=False)."
    )
