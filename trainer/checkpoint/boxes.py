"""Sharded tensors as boxes: which part of the whole this rank holds, and which rank writes it.

A sharded tensor is torch's DTensor, known here by its interface, so that nobody who shards nothing imports it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .index import Piece, Shape


def is_sharded(tensor: Any) -> bool:
    """Whether `tensor` is a DTensor."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def box_of(tensor: Any) -> tuple[Shape, Shape] | None:
    """(offset, shape) of this rank's box of a DTensor; None where its part is no single box."""
    offset, shape = [0] * tensor.dim(), list(tensor.shape)
    for size, rank, placement in zip(
        tensor.device_mesh.shape, tensor.device_mesh.get_coordinate(), tensor.placements, strict=True
    ):
        if placement.is_replicate():
            continue
        if not placement.is_shard() or type(placement).__name__ != "Shard":
            return None
        length = shape[placement.dim]
        chunk = -(-length // size)  # as torch.chunk: equal parts, the last ones short or empty
        begin = min(rank * chunk, length)
        offset[placement.dim] += begin
        shape[placement.dim] = min(begin + chunk, length) - begin
    return tuple(offset), tuple(shape)


def piece_of(name: str, tensor: Tensor, rank: int) -> Piece | None:
    """What rank `rank` writes of a tensor: a DTensor's box on one of the ranks that hold it, all else on rank 0."""
    if not is_sharded(tensor):
        return Piece.whole(name, tensor) if rank == 0 else None
    sharded: Any = tensor
    box = box_of(sharded)
    if box is None:
        whole = sharded.full_tensor()  # a collective; one tensor at a time
        return Piece.whole(name, whole) if rank == 0 else None
    coordinate = sharded.device_mesh.get_coordinate()
    copies = zip(coordinate, sharded.placements, strict=True)
    if any(place and placement.is_replicate() for place, placement in copies):
        return None
    offset, shape = box
    if not math.prod(shape) and any(coordinate):
        return None
    return Piece(name, sharded.to_local().detach(), offset, tuple(sharded.shape))


def new_like(target: Any, dtype: torch.dtype) -> Any:
    """An empty DTensor sharded like `target`."""
    return torch.empty_like(target, dtype=dtype, requires_grad=False)


def as_sharded(whole: Tensor, target: Any) -> Tensor:
    """A whole tensor, alike on all ranks, sharded like `target`."""
    from torch.distributed.tensor import distribute_tensor  # only where something is sharded

    moved = whole.to(target.device_mesh.device_type)
    return distribute_tensor(moved, target.device_mesh, target.placements, src_data_rank=None)


def replicated(whole: Tensor, target: Any) -> Tensor:
    """A whole tensor, alike on all ranks, as a DTensor that can be used with `target`."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = target.device_mesh
    return DTensor.from_local(whole.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)
