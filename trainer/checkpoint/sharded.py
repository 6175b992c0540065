"""Checkpoints of state that is split over ranks: every rank writes the boxes that it holds, and reads those it needs.

`write_sharded` is `save.write` for all ranks together: rank 0 claims the folder, each rank writes files and an index of
its own, and rank 0 writes the manifest once all are durable. `ShardedCheckpoint` reads a checkpoint of any origin into
the shards of a module. No rank ever holds more than its shards and one whole tensor.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...errors import CheckpointError
from .blocks import FileRecord, write_blocks
from .boxes import is_sharded
from .index import Shape, index_name, index_record, into_files, merge
from .load import Loaded
from .manifest import TREES, manifest_bytes
from .save import FILE_BYTES, Draft, Prepared, file_buffers
from .storage import storage_of
from .strict_json import write_json

if TYPE_CHECKING:
    from ...strategies.base import Strategy
    from ...strategies.channel import Channel


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
    names = [index_name(i, ranks) for i in range(ranks)]
    records: dict[str, FileRecord] = {}
    with Draft(storage, wanted) as draft:

        def claim() -> str | None:
            if rank:
                return None
            records[names[0]] = draft.claim(names[0], write_json(index))
            return draft.folder

        folder: str = _on_all(claim, channel, wanted)[0]

        def fill() -> tuple[Any, dict[str, FileRecord]]:
            name, content = (names[rank], index) if rank else (TREES, prepared.trees)
            records[name] = write_blocks(storage, storage.join(folder, name), [memoryview(write_json(content, name))])
            for name, pieces in itertools.chain.from_iterable(part.items() for part in files.values()):
                records[name] = write_blocks(storage, storage.join(folder, name), file_buffers(pieces))
            return index, records

        shares = _on_all(fill, channel, wanted)

        def commit() -> str | None:
            if rank:
                return None
            merge([(name, share[0]) for name, share in zip(names, shares, strict=True)])  # proves the cover
            everything = {name: record for share in shares for name, record in share[1].items()}
            return draft.commit(manifest_bytes(prepared.meta, names, everything))

        return str(_on_all(commit, channel, wanted)[0])


def _on_all(work: Callable[[], Any], channel: Channel, wanted: str) -> list[Any]:
    """What `work` returned on each rank; CheckpointError on all of them where it failed on any."""
    try:
        outcome = work()
    except Exception as error:  # noqa: BLE001  # whatever it is, the others wait to hear of it
        outcome = CheckpointError(str(error) if isinstance(error, (OSError, CheckpointError)) else repr(error))
    outcomes = channel.gather_objects(outcome)
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, CheckpointError):
            raise CheckpointError(
                f"{wanted} could not be saved: rank {rank}: {outcome}. Older checkpoints are untouched."
            )
    return outcomes


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
