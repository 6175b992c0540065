"""What the command line tells of checkpoints: lists, facts, tensors and differences; everything is read verified."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from .load import load, verify
from .manifest import manifest_in
from .pointer import SUFFIX, resolve_pointer
from .storage import Storage, reading, storage_of
from .tensors import dtype_name

_PARTS = ("model", "optimizer", "state")
_DEEPEST = 6


@dataclass(frozen=True)
class Listed:
    """A checkpoint of `list_below`; `problem` is "" where lists, sizes and headers are as they should be.

    Without a valid manifest there is nothing but the problem.
    """

    path: str
    problem: str
    step: int | None = None
    epoch: int | None = None
    time: str | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class TensorFacts:
    """A tensor of a checkpoint; `boxes` is how many pieces it lies in."""

    part: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    boxes: int


@dataclass(frozen=True)
class Difference:
    """What differs between two checkpoints; `largest` is the largest absolute difference of two tensors' numbers."""

    part: str
    name: str
    how: str
    largest: float | None = None


def list_below(folder: str) -> list[Listed]:
    """The checkpoints in `folder` and below it, the oldest first."""
    storage, place = storage_of(resolve_pointer(folder))
    found = []
    for path in _candidates(storage, place, _DEEPEST):
        try:
            manifest = manifest_in(storage, path)
        except CheckpointError as error:
            found.append(Listed(path, str(error)))
            continue
        size = sum(file.size for file in manifest.files.values())
        problem = "; ".join(verify(path, deep=False))
        time = manifest.time.strftime("%Y-%m-%d %H:%M:%S")
        found.append(Listed(path, problem, manifest.global_step, manifest.epoch, time, size))
    return sorted(found, key=lambda one: (one.time or "", one.step or 0))


def _candidates(storage: Storage, folder: str, depth: int) -> Iterator[str]:
    if folder.endswith(SUFFIX):
        yield folder
        return
    with reading(folder):
        names = storage.list(folder)
    for name in sorted(names):
        if names[name] is None and depth and not name.startswith("."):
            path = storage.join(folder, name)
            if storage.exists(path) and not storage.is_file(path):
                yield from _candidates(storage, path, depth - 1)


def facts(path: str) -> dict[str, Any]:
    """What the manifest of a checkpoint says."""
    loaded = load(path)
    manifest = loaded.manifest
    return {
        "path": loaded.path,
        "step": manifest.global_step,
        "epoch": manifest.epoch,
        "saved": manifest.time.isoformat(),
        "ranks": manifest.world_size,
        "bytes": sum(file.size for file in manifest.files.values()),
        **{f"version of {name}": version for name, version in manifest.libraries.items()},
        **{f"file {name}": file.size for name, file in manifest.files.items()},
    }


def tensors_in(path: str) -> list[TensorFacts]:
    """The tensors of a checkpoint, without reading them."""
    return [
        TensorFacts(
            part,
            name,
            dtype_name(record.dtype),
            record.shape,
            math.prod(record.shape) * record.dtype.itemsize,
            len(record.boxes),
        )
        for part, content in load(path)._index.items()
        for name, record in content.tensors.items()
    ]


def differences(one: str, other: str) -> list[Difference]:
    """What differs between two checkpoints: tensors by name, then plain values by their path."""
    left, right = load(one), load(other)
    found = []
    for part in _PARTS:
        found += list(_differences_of(part, dict(leaves(getattr(left, part))), dict(leaves(getattr(right, part)))))
    return found


def _differences_of(part: str, left: dict[str, Any], right: dict[str, Any]) -> Iterator[Difference]:
    for name in dict.fromkeys([*left, *right]):
        if name not in left or name not in right:
            yield Difference(part, name, "only in the first" if name in left else "only in the second")
            continue
        a, b = left[name], right[name]
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if type(a) is not type(b) or repr(a) != repr(b):
                yield Difference(part, name, f"{a!r:.60} and {b!r:.60}")
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            forms = (f"{dtype_name(t.dtype)} {list(t.shape)}" for t in (a, b))
            yield Difference(part, name, " and ".join(forms))
        elif not torch.equal(_bits(a), _bits(b)):
            yield Difference(part, name, f"{_count(a, b)} of {a.numel()} numbers", _largest(a, b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _count(a: Tensor, b: Tensor) -> int:
    return int((_bits(a) != _bits(b)).reshape(a.numel(), -1).any(1).sum())


def _largest(a: Tensor, b: Tensor) -> float | None:
    wide = torch.complex128 if a.is_complex() else torch.float64
    return float((a.to(wide) - b.to(wide)).abs().max())


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a tree by their path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(item, (dict, list, tuple, Tensor)) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    elif hasattr(value, "dtype") and not isinstance(value, Tensor):
        yield path, torch.as_tensor(value)
    else:
        yield path, value
