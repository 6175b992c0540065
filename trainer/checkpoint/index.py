"""Which tensor lies where: the tensors of each part as boxes of their whole shape, spread over files and ranks.

A part ("model", "optimizer", "state") is a set of named tensors. A rank writes the pieces that it holds into files of
its own and lists them in one index; a reader merges the indexes of all ranks and proves that the boxes cover every
tensor exactly. One process writes whole tensors: one box each, in `model.safetensors` or numbered shards.

In JSON, by part and name: `{"dtype": "float32", "shape": [4, 2], "boxes": [{"file": "model.safetensors", "key": name
in the file, "offset": [0, 0], "shape": [4, 2]}]}`, or `{"alias": other name}` for a tensor that shares its memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from .strict_json import short, take, take_counts
from .tensors import MOST_DIMENSIONS, dtype_name, named_dtype

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """What one rank holds of the tensor `name`: the box of the whole shape that begins at `offset`."""

    name: str
    tensor: Tensor
    offset: Shape
    whole_shape: Shape

    @staticmethod
    def whole(name: str, tensor: Tensor) -> Piece:
        """A tensor that one rank holds entirely."""
        return Piece(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape))

    @property
    def key(self) -> str:
        """The name of this piece in its file."""
        whole = tuple(self.tensor.shape) == self.whole_shape
        return self.name if whole else f"{self.name}@{','.join(map(str, self.offset))}"


@dataclass(frozen=True)
class Box:
    """Where a box of a tensor lies."""

    file: str
    key: str
    offset: Shape
    shape: Shape


@dataclass
class TensorRecord:
    """A tensor of a part."""

    dtype: torch.dtype
    shape: Shape
    boxes: list[Box] = field(default_factory=list)


@dataclass
class Part:
    """The tensors of one part by name, and the further names that some of them have."""

    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


Index = dict[str, Part]


def without_aliases(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors with one name for each, and the further names of the same memory under the first."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in tensors.items():
        view = (
            tensor.data_ptr(),
            tensor.device,
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            tensor.is_conj(),
            tensor.is_neg(),
        )
        other = first.setdefault(view, name) if tensor.numel() else name
        if other == name:
            kept[name] = tensor
        else:
            aliases[name] = other
    return kept, aliases


def into_files(part: str, pieces: Iterable[Piece], file_bytes: int, rank: int, ranks: int) -> dict[str, list[Piece]]:
    """The files of one rank's pieces of a part: as few as hold them with at most `file_bytes` each, if they fit."""
    files: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        if not files or size + piece.tensor.nbytes > file_bytes:
            files.append([])
            size = 0
        files[-1].append(piece)
        size += piece.tensor.nbytes
    stem = part if ranks == 1 else f"{part}-{of_rank(rank, ranks)}"
    if len(files) == 1:
        return {f"{stem}.safetensors": files[0]}
    return {f"{stem}-{i:05}-of-{len(files):05}.safetensors": file for i, file in enumerate(files, 1)}


def of_rank(rank: int, ranks: int) -> str:
    """How names of files tell whose they are; ranks count from 0."""
    return f"r{rank:05}-of-{ranks:05}"


def index_name(rank: int, ranks: int) -> str:
    """The name of a rank's index."""
    return "index.json" if ranks == 1 else f"index-{of_rank(rank, ranks)}.json"


def index_record(
    files: Mapping[str, Mapping[str, Sequence[Piece]]], aliases: Mapping[str, Mapping[str, str]], rank: int, ranks: int
) -> dict[str, Any]:
    """One rank's index as JSON, from its files by part and their pieces."""
    parts: dict[str, dict[str, Any]] = {}
    for part, part_files in files.items():
        record = parts[part] = {}
        for file, pieces in part_files.items():
            for piece in pieces:
                entry = record.setdefault(
                    piece.name,
                    {"dtype": dtype_name(piece.tensor.dtype), "shape": list(piece.whole_shape), "boxes": []},
                )
                box = {"file": file, "key": piece.key, "offset": list(piece.offset), "shape": list(piece.tensor.shape)}
                entry["boxes"].append(box)
        record.update({name: {"alias": other} for name, other in aliases.get(part, {}).items()})
    return {"rank": rank, "ranks": ranks, "parts": parts}


def merge(records: Sequence[tuple[str, Any]]) -> Index:
    """The index of a checkpoint from those of its ranks, in order and with their paths; it covers every tensor."""
    index: Index = {}
    for rank, (where, record) in enumerate(records):
        if take(record, "rank", int, where) != rank or take(record, "ranks", int, where) != len(records):
            raise CheckpointError(f"{where} is not the index of rank {rank} of {len(records)}.")
        for part, entries in take(record, "parts", dict, where).items():
            if type(entries) is not dict:
                raise CheckpointError(f"{where}: part {part!r:.80} is {short(entries)}, expected an object.")
            for name, entry in entries.items():
                _merge_entry(index.setdefault(part, Part()), name, entry, f"{where}: {part} tensor {name!r:.200}")
    seen: set[tuple[str, str]] = set()
    for part, content in index.items():
        for name, tensor in content.tensors.items():
            check_cover(tensor, f"{part} tensor {name!r:.200}")
            for box in tensor.boxes:
                if (box.file, box.key) in seen:  # else a small file could fill any memory
                    raise CheckpointError(f"{records[0][0]}: two boxes are {box.key!r:.200} of {box.file:.200}.")
                seen.add((box.file, box.key))
        for name, other in content.aliases.items():
            if other not in content.tensors or name in content.tensors:
                raise CheckpointError(f"{records[0][0]}: {part} tensor {name!r:.200} is an alias of no tensor.")
    return index


def check_cover(tensor: TensorRecord, what: str) -> None:
    """Raise CheckpointError unless the boxes cover the tensor exactly: all within it, no overlap, none missing."""
    for box in tensor.boxes:
        if (
            len(box.shape) != len(tensor.shape)
            or len(box.offset) != len(tensor.shape)
            or any(start + length > end for start, length, end in zip(box.offset, box.shape, tensor.shape, strict=True))
        ):
            raise CheckpointError(f"{what} of shape {list(tensor.shape)} has a box outside it, in {box.file}.")
    covered = sum(math.prod(box.shape) for box in tensor.boxes)
    if covered != math.prod(tensor.shape) or not tensor.boxes:
        raise CheckpointError(f"{what}: {covered} of its {math.prod(tensor.shape)} numbers are in the files.")
    boxes = sorted((box for box in tensor.boxes if math.prod(box.shape)), key=lambda box: box.offset)
    for i, box in enumerate(boxes):
        for other in itertools.islice(boxes, i + 1, None):
            if other.offset and other.offset[0] >= box.offset[0] + box.shape[0]:
                break  # boxes are in order of their first dimension: no later one can overlap either
            if all(
                b < a + n and a < b + m
                for a, n, b, m in zip(box.offset, box.shape, other.offset, other.shape, strict=True)
            ):
                raise CheckpointError(f"{what} has two boxes that overlap, in {box.file} and {other.file}.")


def _merge_entry(part: Part, name: str, entry: Any, where: str) -> None:
    if type(entry) is dict and "alias" in entry:
        part.aliases[name] = take(entry, "alias", str, where)
        return
    dtype = named_dtype(take(entry, "dtype", str, where), where)
    shape = take_counts(entry, "shape", where, MOST_DIMENSIONS)
    record = part.tensors.setdefault(name, TensorRecord(dtype, shape))
    if (record.dtype, record.shape) != (dtype, shape):
        raise CheckpointError(f"{where} has another dtype or shape than in the index of another rank.")
    for box in take(entry, "boxes", list, where):
        record.boxes.append(
            Box(
                take(box, "file", str, where),
                take(box, "key", str, where),
                take_counts(box, "offset", where, MOST_DIMENSIONS),
                take_counts(box, "shape", where, MOST_DIMENSIONS),
            )
        )
