"""`manifest.json`: the one file whose presence makes a folder a checkpoint, and which names and proves all others.

It is written last and carries a checksum of its own content, so that a changed digit in it is noticed too. Only plain
names of files in the same folder are accepted in it.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from ... import __version__
from ...errors import CheckpointError, CheckpointNotFoundError
from .blocks import BLOCK_BYTES, FileRecord, read_small
from .encode import decode, encode
from .pointer import resolve_pointer
from .storage import Storage, reading, storage_of
from .strict_json import MANIFEST_LIMIT_BYTES, read_json, short, take, take_count, take_counts, write_json
from .unfinished import is_temporary

MANIFEST = "manifest.json"
TREES = "state.json"
FORMAT = "paceline.checkpoint"
VERSION = 1

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,199}")
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    `meta` is what was given to `save`; `world_size` is that of the run, `indexes` has one name for each rank that
    wrote.
    """

    global_step: int
    epoch: int
    time: datetime
    world_size: int
    libraries: dict[str, str]
    meta: dict[str, Any]
    indexes: tuple[str, ...]
    files: dict[str, FileRecord]


def encode_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the manifest that are known before anything is written; refuses what it cannot hold."""
    encoded, tensors = encode(dict(meta), "meta")
    if tensors:
        raise CheckpointError(f"{next(iter(tensors))} is a tensor; meta holds none. Put it into the state.")
    return {
        "global_step": take_count(encoded, "global_step", "meta"),
        "epoch": take_count(encoded, "epoch", "meta"),
        "world_size": take_count({"world_size": 1, **encoded}, "world_size", "meta"),
        "libraries": _libraries(),
        "meta": encoded,
    }


def manifest_bytes(encoded_meta: Mapping[str, Any], indexes: Sequence[str], files: Mapping[str, FileRecord]) -> bytes:
    """The manifest of files that are all durable."""
    record = {
        "format": FORMAT,
        "format_version": VERSION,
        "time": datetime.now(timezone.utc).strftime(_TIME),
        **encoded_meta,
        "indexes": list(indexes),
        "files": {
            name: {"size": file.size, "block_bytes": file.block_bytes, "crc32": list(file.crc32)}
            for name, file in files.items()
        },
    }
    return write_json({**record, "crc32": zlib.crc32(write_json(record))}, MANIFEST, MANIFEST_LIMIT_BYTES)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of the checkpoint at `path`, checked; raises CheckpointError if there is no valid one."""
    storage, folder = storage_of(resolve_pointer(path))
    return manifest_in(storage, folder)


def manifest_in(storage: Storage, folder: str) -> Manifest:
    """`read_manifest` of a folder whose storage is known."""
    if is_temporary(storage.split(folder)[1]):
        raise CheckpointError(f"{folder} is a save that never finished. Use another checkpoint.")
    where = storage.join(folder, MANIFEST)
    record = read_json(read_small(storage, _existing(storage, folder, where), MANIFEST_LIMIT_BYTES), where)
    if take(record, "format", str, where) != FORMAT or take(record, "format_version", int, where) != VERSION:
        raise CheckpointError(
            f"{where} is of the format {short(record['format'])} version {short(record['format_version'])}; this "
            f"Paceline reads {FORMAT} version {VERSION}. Read it with the version that wrote it."
        )
    checksum = take_count(record, "crc32", where)
    if zlib.crc32(write_json({key: value for key, value in record.items() if key != "crc32"})) != checksum:
        raise CheckpointError(f"{where} was altered: it does not have its own checksum. Use another checkpoint.")
    return _parse(record, where)


def _existing(storage: Storage, folder: str, where: str) -> str:
    with reading(where):
        if storage.is_file(where):
            return where
        is_file, exists = storage.is_file(folder), storage.exists(folder)
    if is_file:
        raise CheckpointError(
            f"{folder} is a file, and a checkpoint is a folder. The weights of a .ckpt, .pt or .safetensors file are "
            f"read by Module.load_from_checkpoint."
        )
    if exists:
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is no checkpoint, or a save that never finished.")
    raise CheckpointNotFoundError(f"{folder} does not exist.")


def _parse(record: dict[str, Any], where: str) -> Manifest:
    files = {
        name: _parse_file(name, file, f"{where}, file {name!r:.200}")
        for name, file in take(record, "files", dict, where).items()
    }
    indexes = take(record, "indexes", list, where)
    for name in [*indexes, TREES]:
        if type(name) is not str or name not in files:
            raise CheckpointError(f"{where} needs the file {short(name)}, but does not list it.")
    if not indexes:
        raise CheckpointError(f"{where} names no index.")
    try:
        time = datetime.strptime(take(record, "time", str, where), _TIME).replace(tzinfo=timezone.utc)
    except ValueError as error:
        raise CheckpointError(f"{where}: 'time' is {short(record['time'])}, expected {_TIME}.") from error
    return Manifest(
        global_step=take_count(record, "global_step", where),
        epoch=take_count(record, "epoch", where),
        time=time,
        world_size=take_count(record, "world_size", where),
        libraries={str(name): str(version) for name, version in take(record, "libraries", dict, where).items()},
        meta=decode(take(record, "meta", dict, where), {}, f"{where}: meta"),
        indexes=tuple(indexes),
        files=files,
    )


def _parse_file(name: str, record: Any, where: str) -> FileRecord:
    if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST:
        raise CheckpointError(f"{where} is no plain name of a file in this folder.")
    size, block_bytes = take_count(record, "size", where), take_count(record, "block_bytes", where)
    if not 1 <= block_bytes <= BLOCK_BYTES:
        raise CheckpointError(f"{where} has blocks of {block_bytes} bytes, expected 1 to {BLOCK_BYTES}.")
    blocks = -(-size // block_bytes)
    sums = take_counts(record, "crc32", where, blocks)
    if len(sums) != blocks:
        raise CheckpointError(f"{where} has {len(sums)} checksums for {blocks} blocks.")
    return FileRecord(size, sums, block_bytes)


def _libraries() -> dict[str, str]:
    """The versions that may matter when a resumed run is not what it was."""
    found = {"paceline": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    numpy = sys.modules.get("numpy")
    return found if numpy is None else {**found, "numpy": str(numpy.__version__)}
