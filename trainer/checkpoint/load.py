"""Reading a checkpoint: nothing is believed before it is proved, and nothing is executed.

`load` reads the manifest and compares the folder with it; each part is then read when it is first asked for, so that
weights alone cost no more than weights. Every byte is checked against its block's checksum, every header against its
file's size, every box against header and index, before memory for it is taken. `verify` makes the same checks without
keeping anything.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from .blocks import BlockReader, FileRecord, read_small
from .boxes import as_sharded, box_of, new_like, replicated
from .encode import decode, tensor_names
from .index import Box, Index, Part, TensorRecord, merge
from .manifest import MANIFEST, TREES, Manifest, manifest_in
from .pointer import resolve_pointer
from .storage import Storage, storage_of
from .strict_json import TREE_LIMIT_BYTES, read_json, take
from .tensors import PREFIX_BYTES, Entry, bytes_of, empty_host_tensor, header_length, parse_header, stored_form

_TREES = ("extra", "optimizer", "state")


def load(path: str | os.PathLike[str]) -> Loaded:
    """Open the checkpoint at `path` (also a pointer, or without its `.ckpt`).

    Tensors are read into host memory. Raises CheckpointError, here or when a part is first read, for whatever is
    missing, extra, cut, altered or of another version.
    """
    storage, folder = storage_of(resolve_pointer(path))
    manifest = manifest_in(storage, folder)
    problems = _listing_problems(storage, folder, manifest)
    if problems:
        raise CheckpointError(f"{folder}: {problems[0]}. Use another checkpoint.")
    return Loaded(storage, folder, manifest)


def verify(path: str | os.PathLike[str], deep: bool = True) -> list[str]:
    """What is wrong with the checkpoint at `path`, each with the file's name; empty if it is whole.

    With `deep` every byte is read and compared with its checksum; without, only lists, sizes, headers and trees are.
    """
    try:
        storage, folder = storage_of(resolve_pointer(path))
        manifest = manifest_in(storage, folder)
    except CheckpointError as error:
        return [str(error)]
    problems = _listing_problems(storage, folder, manifest)
    if not problems:
        loaded = Loaded(storage, folder, manifest)
        problems += _problem(loaded.check_structure)
        for name in manifest.files if deep else ():
            problems += _problem(partial(loaded.check_bytes, name))
    return list(dict.fromkeys(problems))


class Loaded:
    """An open checkpoint; `model`, `optimizer` and `state` are read once, when first asked for.

    `optimizer` and `state` are None in a checkpoint of weights alone; `meta` and `manifest` are read already.
    """

    def __init__(self, storage: Storage, folder: str, manifest: Manifest) -> None:
        self.path = folder
        self.manifest = manifest
        self.meta = manifest.meta
        self._storage = storage

    @cached_property
    def model(self) -> dict[str, Any]:
        """The model's state dict; tied weights are one tensor under several names."""
        return self._read("model") | self.extra()

    @cached_property
    def optimizer(self) -> Any:
        """The tree that was saved as `optimizer`."""
        return self._tree("optimizer")

    @cached_property
    def state(self) -> Any:
        """The tree that was saved as `state`."""
        return self._tree("state")

    def state_item(self, key: str) -> Any:
        """`state[key]`, or None, reading no other tensors of the state."""
        tree = self._trees.get("state")
        tree = tree.get(key) if type(tree) is dict else None
        return decode(tree, self._read("state", set(tensor_names(tree))), f"{self._where(TREES)}: {key}")

    def tensor_shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """The tensors of a part, by each of their names."""
        held = self._part(part)
        shapes = {name: record.shape for name, record in held.tensors.items()}
        return shapes | {alias: shapes[other] for alias, other in held.aliases.items()}

    def read_as(self, part: str, like: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The tensors of a part; those with a DTensor in `like` sharded like it, reading no more than this rank's."""
        held = self._part(part)
        names = {name: held.aliases.get(name, name) for name in like}
        whole = {other for name, other in names.items() if like[name] is None}
        read = self._read(part, whole) if whole else {}
        with self._files() as files:
            for name, other in names.items():
                target = like[name]
                if target is not None and other not in read:
                    read[other] = _read_like(files, other, held.tensors[other], target)
        return {name: read[other] for name, other in names.items()}

    def tree_as(self, part: str, like: Mapping[str, Tensor | None]) -> Any:
        """The tree of a part with its tensors as by `read_as`."""
        return decode(self._trees.get(part), self.read_as(part, like), f"{self._where(TREES)}: {part}")

    def extra(self) -> dict[str, Any]:
        """What of the model's state dict is no tensor."""
        where = self._where(TREES)
        found = decode(take(self._trees, "extra", dict, where), self._read("extra"), f"{where}: model")
        return take({"extra": found}, "extra", dict, where)

    def model_files(self) -> tuple[Files, dict[str, TensorRecord]]:
        """The open files, to be closed by the caller, and the model's tensors by each of their names."""
        part = self._part("model")
        records = part.tensors | {alias: part.tensors[other] for alias, other in part.aliases.items()}
        return Files(self._storage, self.path, self.manifest.files), records

    def check_structure(self) -> None:
        """Everything but the bytes of tensors: index, headers, trees."""
        for part in _TREES:
            records = self._part(part).tensors
            missing = set(tensor_names(self._trees.get(part))) - {*records, *self._part(part).aliases}
            if missing:
                raise CheckpointError(
                    f"{self._where(TREES)} refers to the tensor {min(missing)!r:.200}, which is nowhere."
                )
        with self._files() as files:
            named = {place for part in self._index.values() for place in _places(part, part.tensors, files)}
            for file in {file for file, _ in named} | {name for name in self.manifest.files if _is_tensors(name)}:
                unnamed = set(files.entries(file)) - {key for other, key in named if other == file}
                if unnamed:
                    raise CheckpointError(f"{self._where(file)} holds {min(unnamed)!r:.200}, which no index names.")

    def check_bytes(self, name: str) -> None:
        """Read all of a file; CheckpointError if it was altered."""
        with BlockReader(self._storage, self._where(name), self.manifest.files[name]) as reader:
            reader.verify()

    def _where(self, file: str) -> str:
        return self._storage.join(self.path, file)

    def _json(self, name: str) -> Any:
        where = self._where(name)
        return read_json(read_small(self._storage, where, TREE_LIMIT_BYTES, self.manifest.files[name]), where)

    @cached_property
    def _index(self) -> Index:
        return merge([(self._where(name), self._json(name)) for name in self.manifest.indexes])

    @cached_property
    def _trees(self) -> dict[str, Any]:
        trees = self._json(TREES)
        if type(trees) is not dict:
            raise CheckpointError(f"{self._where(TREES)} holds no JSON object.")
        return trees

    def _part(self, part: str) -> Part:
        return self._index.get(part, Part())

    def _tree(self, part: str) -> Any:
        return decode(self._trees.get(part), self._read(part), f"{self._where(TREES)}: {part}")

    def _files(self) -> contextlib.closing[Files]:
        return contextlib.closing(Files(self._storage, self.path, self.manifest.files))

    def _read(self, name: str, only: set[str] | None = None) -> dict[str, Tensor]:
        """The tensors of a part, or only some of them."""
        part = self._part(name)
        chosen = set(part.tensors) if only is None else {part.aliases.get(name, name) for name in only}
        wanted = {name: record for name, record in part.tensors.items() if name in chosen}
        with self._files() as files:
            tensors = files.read(wanted)
        return tensors | {alias: tensors[other] for alias, other in part.aliases.items() if other in tensors}


class Files:
    """The open safetensors files of a checkpoint, with their headers."""

    def __init__(self, storage: Storage, folder: str, records: Mapping[str, FileRecord | None]) -> None:
        self._storage = storage
        self._folder = folder
        self._records = records  # None: a file of others, without checksums
        self._open: dict[str, tuple[BlockReader, dict[str, Entry]]] = {}

    def entries(self, file: str) -> dict[str, Entry]:
        """The header of a file."""
        return self._opened(file)[1]

    def place(self, tensor: TensorRecord, name: str, box: Box) -> Entry:
        """Where a box lies in its file, after a proof that header and index agree."""
        entry = self.entries(box.file).get(box.key)
        if entry is None or (entry.dtype, entry.shape) != stored_form(tensor.dtype, box.shape):
            raise CheckpointError(
                f"{self._storage.join(self._folder, box.file)} does not hold {name!r:.200} as the index says: "
                f"{tensor.dtype} of shape {list(box.shape)}."
            )
        return entry

    def read(self, records: Mapping[str, TensorRecord]) -> dict[str, Tensor]:
        """The tensors of these records, read in the order in which they lie in the files."""
        first = {}
        for name, record in records.items():  # all proved before memory is taken for any
            first[name] = min((box.file, self.place(record, name, box).start) for box in record.boxes)
        tensors = {name: self.read_box(name, records[name]) for name in sorted(records, key=lambda name: first[name])}
        return {name: tensors[name] for name in records}

    def read_box(
        self, name: str, record: TensorRecord, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> Tensor:
        """A box of a tensor, or all of it, from whichever boxes are stored; whole rows of these and no others."""
        offset, shape = offset or (0,) * len(record.shape), record.shape if shape is None else tuple(shape)
        result: Tensor | None = None
        for box in record.boxes:
            begin = [max(a, b) for a, b in zip(offset, box.offset, strict=True)]
            end = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, box.offset, box.shape, strict=True)]
            if any(b >= e for b, e in zip(begin, end, strict=True)):
                continue
            entry = self.place(record, name, box)
            first, rows = (begin[0] - box.offset[0], end[0] - begin[0]) if begin else (0, 1)
            piece, stored = empty_host_tensor(record.dtype, (rows, *box.shape[1:]) if begin else ())
            row_bytes = record.dtype.itemsize * math.prod(box.shape[1:])
            self._opened(box.file)[0].read_into(bytes_of(stored), entry.start + first * row_bytes)
            if piece.shape == shape:
                return piece
            result = torch.empty(shape, dtype=record.dtype) if result is None else result
            ranges = list(zip(begin, end, box.offset, strict=True))[1:]
            taken = (slice(None), *(slice(b - o, e - o) for b, e, o in ranges)) if begin else ()
            result[tuple(slice(b - o, e - o) for b, e, o in zip(begin, end, offset, strict=True))] = piece[taken]
        return torch.empty(shape, dtype=record.dtype) if result is None else result

    def close(self) -> None:
        """Close them all."""
        for reader, _ in self._open.values():
            reader.close()

    def _opened(self, file: str) -> tuple[BlockReader, dict[str, Entry]]:
        if file not in self._open:
            if file not in self._records or not _is_tensors(file):
                raise CheckpointError(
                    f"{self._folder}: the index names {file!r:.200}, which is no tensor file of the manifest."
                )
            reader = BlockReader(self._storage, self._storage.join(self._folder, file), self._records[file])
            self._open[file] = reader, {}  # close() must see it even if its header is refused
            self._open[file] = reader, read_header(reader)
        return self._open[file]


def read_header(reader: BlockReader) -> dict[str, Entry]:
    """The header of an open safetensors file."""
    length = header_length(bytes(reader.read(0, PREFIX_BYTES)), reader.size, reader.path)
    return parse_header(bytes(reader.read(PREFIX_BYTES, PREFIX_BYTES + length)), reader.size, reader.path)


def read_safetensors(storage: Storage, path: str) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` file of any origin; its header is checked, checksums it has none."""
    tensors = {}
    with BlockReader(storage, path) as reader:
        for name, entry in read_header(reader).items():
            tensors[name] = torch.empty(entry.shape, dtype=entry.dtype)
            reader.read_into(bytes_of(tensors[name]), entry.start)
    return tensors


@torch.no_grad()
def _read_like(files: Files, name: str, record: TensorRecord, target: Tensor) -> Tensor:
    """A tensor of the checkpoint, sharded like `target`; one of another shape whole, but beside it on its mesh."""
    if record.shape != tuple(target.shape):
        return replicated(files.read({name: record})[name], target)
    new = new_like(target, record.dtype)
    box = box_of(target)
    if box is None:
        return as_sharded(files.read({name: record})[name], target)
    new.to_local().copy_(files.read_box(name, record, *box))
    result: Tensor = new
    return result


def _problem(check: Callable[[], None]) -> list[str]:
    try:
        check()
    except CheckpointError as error:
        return [str(error)]
    return []


def _listing_problems(storage: Storage, folder: str, manifest: Manifest) -> list[str]:
    """How the folder differs from its manifest; hidden files, which systems leave anywhere, do not count."""
    found: dict[str, int | None] = {}
    try:
        with contextlib.suppress(FileNotFoundError):
            found = storage.list(folder)
    except OSError as error:
        return [f"the folder cannot be listed: {error.strerror or error}"]
    problems = []
    for name, record in manifest.files.items():
        if name not in found and storage.is_file(storage.join(folder, name)):
            continue  # lists of object stores may lag; its size is compared when it is opened
        if name not in found:
            problems.append(f"{name} is missing")
        elif found[name] is None:
            problems.append(f"{name} is no plain file")
        elif found[name] != record.size:
            problems.append(f"{name} has {found[name]} bytes, the manifest says {record.size}: it was cut or altered")
    extra = found.keys() - manifest.files.keys() - {MANIFEST}
    return problems + [f"{name} is not in the manifest" for name in sorted(extra) if not name.startswith(".")]


def _places(part: Part, records: Mapping[str, TensorRecord], files: Files) -> Iterable[tuple[str, str]]:
    """The file and key of every box, after comparing them with the headers."""
    for name, tensor in records.items():
        for box in tensor.boxes:
            files.place(tensor, name, box)
            yield box.file, box.key


def _is_tensors(file: str) -> bool:
    return file.endswith(".safetensors")
