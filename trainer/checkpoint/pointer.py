"""Pointers: small JSON files such as `last.ckpt` that name a checkpoint beside them and are replaced atomically.

They have the name that a checkpoint would have, so that a path to `last.ckpt` works whether it is a folder or a
pointer.
"""

from __future__ import annotations

import os

from ...errors import CheckpointError
from .blocks import BlockReader
from .storage import reading, storage_of, writing
from .strict_json import read_json, take, write_json
from .unfinished import temporary_name

_FORMAT = "paceline.pointer"
_LIMIT_BYTES = 2**16
SUFFIX = ".ckpt"  # of folders, and of pointers to them


def write_pointer(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> str:
    """Make `path`, such as `checkpoints/last.ckpt`, point to the checkpoint `target` beside it; returns its path.

    The pointer that is there is replaced; anything else of that name is left alone, with a CheckpointError.
    """
    storage, path = storage_of(path)
    folder, name = storage.split(path)
    target_folder, target_name = storage.split(storage_of(target)[1])
    if target_folder != folder:
        raise CheckpointError(f"{path} cannot point to {os.fspath(target)}: a pointer names a checkpoint beside it.")
    if storage.exists(path) and (not storage.is_file(path) or _target(path) is None):
        raise CheckpointError(f"{path} exists and is no pointer. Move it away, or choose another name.")
    data = write_json({"format": _FORMAT, "format_version": 1, "target": target_name})
    with writing(path, "written"):
        storage.replace(path, data, storage.join(folder, temporary_name(name)))
    return path


def resolve_pointer(path: str | os.PathLike[str]) -> str:
    """The checkpoint that `path` means: what a pointer points to; with `.ckpt` added if only that exists."""
    storage, place = storage_of(path)
    with reading(place):
        if not storage.exists(place) and storage.exists(place + SUFFIX):
            place += SUFFIX
        if not storage.is_file(place):
            return place
    target = _target(place)
    return place if target is None else storage.join(storage.split(place)[0], target)


def _target(path: str) -> str | None:
    """The name that a pointer holds; None if the file is none."""
    storage, path = storage_of(path)
    with BlockReader(storage, path) as reader:
        if reader.size > _LIMIT_BYTES:
            return None
        data = bytes(reader.read(0, reader.size))
    if b'"' + _FORMAT.encode() + b'"' not in data:
        return None
    target = take(read_json(data, path), "target", str, path)
    if not target or target.startswith(".") or "/" in target or "\\" in target:
        raise CheckpointError(f"{path} points to {target!r:.200}, which is no name in its folder.")
    return target
