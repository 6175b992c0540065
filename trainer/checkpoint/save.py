"""Writing a checkpoint: everything goes into a fresh folder that counts only from its last step on.

`save` reads top to bottom: the tensors are dealt to files, the index and the trees are written, the files streamed,
and the manifest makes it valid. A `Draft` is that fresh folder. On a disk it has a temporary name and is renamed into
its place as a whole; on an object store it is in its place from the start, claimed by creating `index.json`, and its
manifest comes last. Either way a taken name is left alone and `-v1`, `-v2` ... is used. Nothing is copied but what
must be: tensors on devices and non-contiguous ones, one at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from .blocks import FileRecord, record_of, write_blocks
from .boxes import piece_of
from .encode import encode
from .index import Piece, index_name, index_record, into_files, merge, without_aliases
from .manifest import MANIFEST, TREES, encode_meta, manifest_bytes, manifest_in
from .pointer import SUFFIX
from .storage import Disk, Storage, remove_folder, storage_of, writing
from .strict_json import write_json
from .tensors import bytes_of, header, host_tensor, why_not_storable
from .unfinished import Lock, sweep, temporary_name

FILE_BYTES = 10 * 2**30
INDEX = index_name(0, 1)


def save(
    path: str | os.PathLike[str],
    *,
    model: Mapping[str, Any],
    optimizer: Any = None,
    state: Any = None,
    meta: Mapping[str, Any],
    file_bytes: int = FILE_BYTES,
) -> str:
    """Write a checkpoint and return the path that it got; when this returns it is durable.

    `model` is a state dict; what in it is no tensor (extra state) is kept too. `optimizer` and `state` are trees of
    what `encode` takes. `meta` is small, without tensors, goes into the manifest and must hold `global_step` and
    `epoch`. A part larger than `file_bytes` is cut into numbered files. Raises CheckpointError, after which nothing
    counts that did not count before.
    """
    return write(path, prepare(model=model, optimizer=optimizer, state=state, meta=meta), file_bytes)


@dataclass
class Prepared:
    """What is to be written: plain values taken apart and copied, tensors (by part) still those of the caller."""

    parts: dict[str, list[Piece]]
    aliases: dict[str, dict[str, str]]
    trees: dict[str, Any]
    meta: dict[str, Any]


def prepare(
    *, model: Mapping[str, Any], optimizer: Any = None, state: Any = None, meta: Mapping[str, Any], rank: int = 0
) -> Prepared:
    """The first half of `save`: raises CheckpointError for what cannot be stored. Nothing is written or copied.

    Of sharded tensors it takes what `rank` is to write, of all others everything on rank 0 and nothing elsewhere.
    """
    parts, aliases, trees = _take_apart(model, optimizer, state, rank)
    return Prepared(parts, aliases, trees, encode_meta(meta))


def write(path: str | os.PathLike[str], prepared: Prepared, file_bytes: int = FILE_BYTES) -> str:
    """The second half of `save`, in any thread."""
    storage, wanted = storage_of(path)
    files = {part: into_files(part, pieces, file_bytes, 0, 1) for part, pieces in prepared.parts.items() if pieces}
    index = index_record(files, prepared.aliases, 0, 1)
    merge([(INDEX, index)])  # proves the cover
    with writing(wanted), Draft(storage, wanted) as draft:
        records = {INDEX: draft.claim(INDEX, write_json(index, INDEX))}
        records[TREES] = write_blocks(storage, draft.path(TREES), [memoryview(write_json(prepared.trees, TREES))])
        for name, pieces in itertools.chain.from_iterable(part.items() for part in files.values()):
            records[name] = write_blocks(storage, draft.path(name), file_buffers(pieces))
        return draft.commit(manifest_bytes(prepared.meta, [INDEX], records))


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a checkpoint; from its first step on it counts no more. What is no valid one is left, with an error."""
    storage, folder = storage_of(path)
    manifest = manifest_in(storage, folder)
    with writing(folder, "removed"):
        if isinstance(storage, Disk):
            parent, name = storage.split(folder)
            doomed = storage.join(parent, temporary_name(name))
            storage.rename(folder, doomed)
            remove_folder(storage, doomed)
        else:
            for name in (MANIFEST, *manifest.files):
                storage.remove(storage.join(folder, name))


class Draft:
    """A folder that is no checkpoint until `commit`; leaving the context without it removes the folder again."""

    def __init__(self, storage: Storage, wanted: str) -> None:
        self._storage = storage
        self._wanted = wanted if wanted.endswith(SUFFIX) else wanted + SUFFIX
        self._lock: Lock | None = None
        self._folder: str | None = None

    def __enter__(self) -> Draft:
        return self

    @property
    def folder(self) -> str:
        """Where its files go."""
        assert self._folder is not None, "claim() comes first"
        return self._folder

    def path(self, name: str) -> str:
        """Where to write the file `name`."""
        return self._storage.join(self.folder, name)

    def claim(self, name: str, data: bytes) -> FileRecord:
        """Make the folder and write its first file. On an object store that file is what makes the folder ours."""
        parent, last = self._storage.split(self._wanted)
        self._storage.make_folder(parent)
        if isinstance(self._storage, Disk):
            sweep(self._storage, parent)
            self._folder = self._storage.join(parent, temporary_name(last))
            self._storage.make_folder(self._folder)
            self._lock = Lock(self._folder)
            self._storage.create(self.path(name), data)
            return record_of(data)
        for folder in _versions(self._wanted):
            if not self._storage.exists(folder):
                with contextlib.suppress(FileExistsError):  # else another run was faster
                    self._storage.create(self._storage.join(folder, name), data)
                    self._folder = folder
                    break
        return record_of(data)

    def commit(self, manifest: bytes) -> str:
        """Write the manifest and make the folder a checkpoint; returns its path."""
        folder = self._folder
        assert folder is not None, "claim() comes first"
        if isinstance(self._storage, Disk):
            self._storage.create(self.path(MANIFEST), manifest)
            self._storage.sync(folder)
            folder = _rename_to_free_name(self._storage, folder, self._wanted)
        else:
            self._storage.replace(self.path(MANIFEST), manifest, "")  # a PUT that may be repeated: the folder is ours
        self._folder = None  # it is a checkpoint now, whatever fails below
        self._storage.sync(self._storage.split(folder)[0])
        return folder

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            with contextlib.suppress(OSError):  # what stays does not count; the first error is the one to tell
                remove_folder(self._storage, self._folder, first=MANIFEST)
        if self._lock is not None:
            self._lock.release()


def _rename_to_free_name(disk: Disk, folder: str, wanted: str) -> str:
    for place in _versions(wanted):
        if disk.exists(place):
            continue
        try:
            disk.rename(folder, place)
        except OSError:
            if not disk.exists(place):
                raise
            continue  # another run took the name since we looked
        return place
    raise AssertionError("versions never end")


def _take_apart(
    model: Mapping[str, Any], optimizer: Any, state: Any, rank: int
) -> tuple[dict[str, list[Piece]], dict[str, dict[str, str]], dict[str, Any]]:
    """The pieces of each part, the aliases of each part, and the trees of state.json."""
    tensors: dict[str, dict[str, Tensor]] = {"model": {k: v for k, v in model.items() if isinstance(v, Tensor)}}
    for name, tensor in tensors["model"].items():
        reason = "has a reserved name." if name == "__metadata__" else why_not_storable(tensor)
        if reason is not None:
            raise CheckpointError(f"model.{name} is a tensor that {reason}")
    extra, extra_tensors = encode({k: v for k, v in model.items() if not isinstance(v, Tensor)}, "model")
    trees = {"extra": extra}
    trees["optimizer"], tensors["optimizer"] = encode(optimizer, "optimizer")
    trees["state"], tensors["state"] = encode(state)
    tensors["extra"] = extra_tensors
    parts, aliases = {}, {}
    for part, named in tensors.items():
        pieces = {name: piece for name, tensor in named.items() if (piece := piece_of(name, tensor, rank)) is not None}
        kept, aliases[part] = without_aliases({name: piece.tensor for name, piece in pieces.items()})
        parts[part] = [pieces[name] for name in kept]
    return parts, aliases, trees


def file_buffers(pieces: Sequence[Piece]) -> Iterator[memoryview]:
    """The bytes of a safetensors file of these pieces."""
    by_key = {piece.key: piece.tensor for piece in pieces}
    head, order = header({key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in by_key.items()})
    yield memoryview(head)
    for key in order:
        yield bytes_of(host_tensor(by_key[key]))


def _versions(path: str) -> Iterator[str]:
    """`path` and the names to use where it is taken."""
    yield path
    for version in itertools.count(1):
        yield f"{path.removesuffix(SUFFIX)}-v{version}{SUFFIX}"
