"""A data set's fingerprint: its type, its length and the content of three samples.

Every rank must see the same data, or ranks would train different samples under the same numbers; and a resumed run
must find what it was saved with.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..errors import ConfigurationError
from .iterables import deals_by_rank
from .loaders import can_be_taken_over, length_of
from .rank_zero import rank_zero_warn
from .rng import Place, arrive_at, isolated, place_kept

if TYPE_CHECKING:
    from ..strategies.base import Strategy

_SAMPLE = "sample "


def fingerprint(loader: Any) -> dict[str, Any]:
    """What to compare of a loader; reads three samples of map-style data without moving the random streams."""
    loader = getattr(loader, "user_loader", loader)
    facts: dict[str, Any] = {"loader": type(loader).__qualname__}
    if can_be_taken_over(loader):
        facts |= {"batch_size": loader.batch_size, **_content(loader.dataset)}
    elif isinstance(loader, Sequence):
        facts |= _content(loader)
    elif isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        facts["data set"] = type(loader.dataset).__qualname__
        if not deals_by_rank(loader):
            facts["length"] = length_of(loader.dataset)
    return facts


def _content(dataset: Any) -> dict[str, Any]:
    """The length comes first: where it differs, samples do too."""
    facts: dict[str, Any] = {"data set": type(dataset).__qualname__, "length": length_of(dataset)}
    if facts["length"]:
        for index in sorted({0, facts["length"] // 2, facts["length"] - 1}):
            facts[f"{_SAMPLE}{index}"] = _digest(dataset, index)
    return facts


def _digest(dataset: Any, index: int) -> str | None:
    """A hash of one sample; None where it is another each time, or cannot be read or written by itself."""
    try:
        first, again = (_hash_of_sample(dataset, index) for _ in range(2))
    except (pickle.PicklingError, AttributeError, TypeError, LookupError):  # an index may be a key of a sampler
        return None
    return first if first == again else None


def _hash_of_sample(dataset: Any, index: int) -> str:
    with isolated(0), place_kept():
        arrive_at(Place(0, 0, 0))
        return _hash(dataset[index])


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
    """Compare the data of all ranks; a collective. Other samples are a warning, anything else a ConfigurationError."""
    if strategy.world_size == 1:
        return
    leaves = [leaf for loader in loaders for leaf in (getattr(loader, "flattened", None) or [loader])]
    found = strategy.all_gather_object([fingerprint(getattr(leaf, "planned", leaf)) for leaf in leaves])
    for rank, theirs in enumerate(found):
        if len(theirs) != len(found[0]):
            raise ConfigurationError(_difference(stage, rank, "number of loaders", len(theirs), len(found[0])))
        for expected, facts in zip(found[0], theirs, strict=True):
            for name, value in expected.items():
                if name in facts and (facts[name] == value or None in (facts[name], value)):
                    continue
                difference = _difference(stage, rank, name, facts.get(name), value)
                if not name.startswith(_SAMPLE):
                    raise ConfigurationError(difference)
                rank_zero_warn(f"{difference} Data drawn or split at random needs seed_everything() before.")
                return


def _difference(stage: str, rank: int, name: str, found: Any, expected: Any) -> str:
    return (
        f"The {stage} data of rank {rank} is not that of rank 0: {name} {found!r}, expected {expected!r}. Every rank "
        "should make the same data set; the trainer deals it. To shard it yourself, use "
        "Trainer(use_distributed_sampler=False)."
    )
