"""Checkpoints of state that is split over ranks: every rank writes the boxes that it holds, and reads those it needs.

`write_sharded` is `save.write` for all ranks together: rank 0 claims the folder, each rank writes files and an index of
its own, and rank 0 writes the manifest once all are durable. `ShardedCheckpoint` reads a checkpoint of any origin into
the shards of a module. No rank ever holds more than its shards and one whole tensor.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...errors import CheckpointError
from .blocks import FileRecord, write_blocks
from .boxes import is_sharded
from .index import Shape, index_name, index_record, into_files, merge
from .load import Loaded
from .manifest import TREES, manifest_bytes
from .save import FILE_BYTES, Draft, Prepared, errors_named, file_buffers
from .storage import storage_of
from .strict_json import write_json

if TYPE_CHECKING:
    from ...strategies.base import Strategy


def write_sharded(path: str | os.PathLike[str], prepared: Prepared, strategy: Strategy) -> str:
    """Write what all ranks prepared; returns its path on every rank. Called by all, in one thread of each.

    Raises CheckpointError on every rank if any of them fails: then nothing counts.
    """
    channel = strategy.channel("checkpoint")
    rank, ranks = strategy.rank, strategy.world_size
    storage, wanted = storage_of(path)
    files = {
        part: into_files(part, pieces, FILE_BYTES, rank, ranks) for part, pieces in prepared.parts.items() if pieces
    }
    index = index_record(files, prepared.aliases, rank, ranks)
    with errors_named(wanted), Draft(storage, wanted) as draft:
        records: dict[str, FileRecord] = {}
        outcome: Any = None
        try:
            if rank == 0:
                records[index_name(0, ranks)] = draft.claim(index_name(0, ranks), write_json(index))
                outcome = draft.folder
        except (OSError, CheckpointError) as error:
            outcome = error
        folder = channel.gather_objects(outcome)[0]
        if isinstance(folder, Exception):
            raise folder
        outcome = None
        try:
            if rank == 0:
                records[TREES] = write_blocks(
                    storage, draft.path(TREES), [memoryview(write_json(prepared.trees, TREES))]
                )
            else:
                place = storage.join(folder, index_name(rank, ranks))
                records[index_name(rank, ranks)] = write_blocks(storage, place, [memoryview(write_json(index))])
            for name, pieces in itertools.chain.from_iterable(part.items() for part in files.values()):
                records[name] = write_blocks(storage, storage.join(folder, name), file_buffers(pieces))
        except (OSError, CheckpointError) as error:
            outcome = error
        shares = channel.gather_objects(outcome or (index, records))
        _raise_first(shares, wanted)
        outcome = None
        try:
            if rank == 0:
                merge([(index_name(i, ranks), share[0]) for i, share in enumerate(shares)])  # proves the cover
                everything = {name: record for share in shares for name, record in share[1].items()}
                names = [index_name(i, ranks) for i in range(ranks)]
                outcome = draft.commit(manifest_bytes(prepared.meta, names, everything))
        except (OSError, CheckpointError) as error:
            outcome = error
        saved = channel.gather_objects(outcome)[0]
    if isinstance(saved, Exception):
        raise saved
    return str(saved)


def _raise_first(shares: Sequence[Any], wanted: str) -> None:
    for rank, share in enumerate(shares):
        if isinstance(share, Exception):
            raise CheckpointError(
                f"{wanted} could not be saved: rank {rank}: {share}. Older checkpoints are untouched."
            )


class ShardedCheckpoint:
    """An open checkpoint (`load.Loaded`), read into shards like those of `targets`, the module's tensors by name."""

    def __init__(self, loaded: Loaded, targets: Mapping[str, Tensor]) -> None:
        self._loaded = loaded
        self._targets = targets

    def model(self) -> dict[str, Any]:
        """The model's state dict; what is a shard in the module is one here."""
        names = self._loaded.tensor_shapes("model")
        like = {name: self._like(name, shape) for name, shape in names.items()}
        return self._loaded.read_as("model", like) | self._loaded.extra()

    def optimizer(self) -> Any:
        """The optimizers' trees; state with the shape of its parameter is sharded like it.

        Other state, as the rows' and columns' statistics of Adafactor, is whole on every rank, and on the same mesh.
        """
        return self._loaded.tree_as("optimizer", self._like_of_state("optimizer"))

    def state(self) -> Any:
        """The rest; tensors that are called as a parameter and have its shape are sharded like it."""
        return self._loaded.tree_as("state", self._like_of_state("state"))

    def _like(self, name: str, shape: Shape) -> Tensor | None:
        target = self._targets.get(name)
        return target if target is not None and is_sharded(target) and tuple(target.shape) == shape else None

    def _like_of_state(self, part: str) -> dict[str, Tensor | None]:
        """A parameter for each tensor: that whose whole name is part of the tensor's, the longest such."""
        found: dict[str, Tensor | None] = {}
        by_length = sorted(self._targets, key=len, reverse=True)
        for name, shape in self._loaded.tensor_shapes(part).items():
            owner = next((target for target in by_length if f".{target}." in f".{name}."), None)
            if owner is None:
                found[name] = None
            elif part == "optimizer" and math.prod(shape) > 1 and is_sharded(self._targets[owner]):
                found[name] = self._targets[owner]
            else:
                found[name] = self._like(owner, shape)
        return found
