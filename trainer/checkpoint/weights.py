"""`load_weights`: large weights from files straight into a module's tensors, one tensor at a time, by byte ranges.

Under FSDP and HSDP a rank reads its own shards and nothing else; what all ranks hold whole, rank 0 reads for all. The
source is a `.safetensors`
file, an index of several (`model.safetensors.index.json`, as Hugging Face writes it), a folder with either, or a
checkpoint of ours. Nothing is executed, and host memory never holds more than one tensor beyond the module's own.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..rank_zero import rank_zero_warn
from .blocks import read_small
from .boxes import as_sharded, box_of, is_sharded
from .index import Box, TensorRecord
from .load import Files, load
from .pointer import resolve_pointer
from .storage import Storage, storage_of
from .strict_json import MANIFEST_LIMIT_BYTES, read_json, take

if TYPE_CHECKING:
    from ...strategies.base import Strategy

INDEX_SUFFIX = ".safetensors.index.json"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,199}\.safetensors")


@dataclass(frozen=True)
class WeightsRequest:
    """What `Trainer.load_weights` was asked for: `prefix` stands before the file's names in the module."""

    path: str
    prefix: str = ""
    strict: bool = True


@torch.no_grad()
def load_weights(request: WeightsRequest, targets: Mapping[str, Tensor], strategy: Strategy) -> None:
    """Fill `targets`, a module's tensors by name, from `request.path`; a collective.

    Raises CheckpointError for what cannot be read, for shapes that differ, and (`strict`) for names on one side only.
    """
    where = request.path
    with _opened(where) as (files, records):
        wanted = {
            name.removeprefix(request.prefix): t for name, t in targets.items() if name.startswith(request.prefix)
        }
        _check_names(request, set(wanted), set(records), _aliases(wanted))
        done: set[int] = set()
        for name, target in wanted.items():
            record = records.get(name)
            if record is None or id(target) in done:
                continue
            if record.shape != tuple(target.shape):
                raise CheckpointError(
                    f"{where} holds {name!r:.200} with the shape {list(record.shape)}, the module has "
                    f"{list(target.shape)}. Build the module with the sizes of the file."
                )
            done.add(id(target))
            if is_sharded(target):
                _fill_shard(files, name, record, target)
            else:
                _fill_whole(files, name, record, target.detach(), strategy)


def stored_names(request: WeightsRequest) -> set[str]:
    """The names of what a request will fill, if the module has them."""
    with _opened(request.path) as (_, records):
        return {request.prefix + name for name in records}


def _fill_whole(files: Files, name: str, record: TensorRecord, target: Tensor, strategy: Strategy) -> None:
    def fill() -> None:
        target.copy_(files.read_box(name, record))

    strategy.from_rank_zero(fill)
    values = target.contiguous()
    strategy.broadcast(values)
    target.copy_(values)


def _fill_shard(files: Files, name: str, record: TensorRecord, target: Tensor) -> None:
    box = box_of(target)
    if box is None:
        target.copy_(as_sharded(files.read({name: record})[name].to(target.dtype), target))
    else:
        sharded: Any = target
        sharded.to_local().copy_(files.read_box(name, record, *box))


def _aliases(wanted: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """The other names of each tensor that has several."""
    names: dict[int, set[str]] = {}
    for name, tensor in wanted.items():
        names.setdefault(id(tensor), set()).add(name)
    return {name: names[id(tensor)] for name, tensor in wanted.items()}


def _check_names(request: WeightsRequest, wanted: set[str], found: set[str], aliases: Mapping[str, set[str]]) -> None:
    missing = {name for name in wanted if not aliases[name] & found}
    unknown = found - wanted
    told = []
    if missing:
        told.append(f"it lacks {_some(missing)} of the module")
    if unknown:
        told.append(f"the module lacks its {_some(unknown)}")
    if not wanted or not wanted & found:
        told.append(f"no name of both is alike under prefix={request.prefix!r}")
    if not told:
        return
    text = f"{request.path}: {'; '.join(told)}."
    if request.strict or not wanted & found:
        raise CheckpointError(f"{text} Name the part of the module with prefix=..., or allow it with strict=False.")
    rank_zero_warn(text)


def _some(names: set[str]) -> str:
    first = ", ".join(map(repr, sorted(names)[:5]))
    return first if len(names) <= 5 else f"{first} and {len(names) - 5} more"


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[Files, dict[str, TensorRecord]]]:
    """The files behind `path`, open, and their tensors by name."""
    storage, place = storage_of(path)
    if storage.is_file(place) and place.endswith(INDEX_SUFFIX):
        opened = _by_index(storage, *storage.split(place))
    elif storage.is_file(place) and place.endswith(".safetensors"):
        folder, name = storage.split(place)
        opened = _by_files(storage, folder, [name], {})
    elif names := _names_in(storage, place):
        by_index = names[0].endswith(INDEX_SUFFIX)
        opened = _by_index(storage, place, names[0]) if by_index else _by_files(storage, place, names, {})
    else:
        opened = load(resolve_pointer(path)).model_files()
    with contextlib.closing(opened[0]):
        yield opened


def _names_in(storage: Storage, folder: str) -> list[str]:
    """The index, or else the only file, in a folder of weights that is no checkpoint of ours."""
    if storage.is_file(folder) or storage.is_file(storage.join(folder, "manifest.json")):
        return []
    try:
        found = sorted(storage.list(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    indexes = [name for name in found if name.endswith(INDEX_SUFFIX)]
    files = [name for name in found if name.endswith(".safetensors")]
    return indexes[:1] or (files if len(files) == 1 else [])


def _by_index(storage: Storage, folder: str, name: str) -> tuple[Files, dict[str, TensorRecord]]:
    where = storage.join(folder, name)
    places = take(read_json(read_small(storage, where, MANIFEST_LIMIT_BYTES), where), "weight_map", dict, where)
    for file_name in places.values():
        if type(file_name) is not str or not _PLAIN_NAME.fullmatch(file_name):
            raise CheckpointError(f"{where} names {file_name!r:.200}, which is no .safetensors file beside it.")
    return _by_files(storage, folder, sorted(set(places.values())), places)


def _by_files(
    storage: Storage, folder: str, names: list[str], places: Mapping[str, str]
) -> tuple[Files, dict[str, TensorRecord]]:
    files = Files(storage, folder, dict.fromkeys(names))
    records = {}
    for name in names:
        for key, entry in files.entries(name).items():
            if places.get(key, name) == name:
                box = Box(name, key, (0,) * len(entry.shape), entry.shape)
                records[key] = TensorRecord(entry.dtype, entry.shape, [box])
    lost = set(places) - set(records)
    if lost:
        files.close()
        raise CheckpointError(f"{folder}: the index names {_some(lost)}, which its files do not hold.")
    return files, records
