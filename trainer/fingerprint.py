"""A data set's fingerprint: its type, its length and the content of three samples.

Every rank must see the same data, or ranks would train different samples under the same numbers; and a resumed run
must find what it was saved with.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from ..errors import ConfigurationError
from .loaders import length_of
from .rng import isolated

if TYPE_CHECKING:
    from ..strategies.base import Strategy


def fingerprint(loader: Any) -> dict[str, Any]:
    """What to compare of a map-style loader's data set; reads three samples without moving the random streams."""
    dataset = loader.dataset
    facts: dict[str, Any] = {"type": type(dataset).__qualname__, "length": length_of(dataset)}
    if facts["length"]:
        with isolated(0):
            facts["samples"] = [_digest(dataset, i) for i in sorted({0, facts["length"] // 2, facts["length"] - 1})]
    return facts


def _digest(dataset: Any, index: int) -> str:
    """A hash of one sample; "" where it cannot be read or written by itself (indices may be keys of a sampler)."""
    try:
        sample = dataset[index]
        written = io.BytesIO()
        torch.save(sample, written)  # never read back
        return hashlib.blake2s(written.getvalue(), digest_size=8).hexdigest()
    except (pickle.PicklingError, AttributeError, TypeError, LookupError):
        return ""


def check_alike(loader: Any, strategy: Strategy) -> None:
    """ConfigurationError on every rank when the training data of one differs from rank 0's."""
    if strategy.world_size == 1 or not isinstance(loader, DataLoader):
        return
    found = strategy.all_gather_object(fingerprint(loader))
    for rank, facts in enumerate(found):
        for name, expected in found[0].items():
            if facts.get(name) != expected:
                raise ConfigurationError(
                    f"The training data of rank {rank} is not that of rank 0: {name} {facts.get(name)!r}, expected "
                    f"{expected!r}. Every rank must make the same data set; the trainer deals it. To shard it "
                    "yourself, use Trainer(use_distributed_sampler=False)."
                )
