"""Checkpoints of several ranks: boxes are put together, and a cover that is not exact is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paceline.errors import CheckpointError
from paceline.trainer.checkpoint import load, verify
from paceline.trainer.checkpoint.blocks import record_of, write_blocks
from paceline.trainer.checkpoint.index import (
    Box,
    Piece,
    TensorRecord,
    check_cover,
    index_name,
    index_record,
    into_files,
    merge,
)
from paceline.trainer.checkpoint.manifest import encode_meta, manifest_bytes
from paceline.trainer.checkpoint.save import Draft, file_buffers
from paceline.trainer.checkpoint.storage import storage_of
from paceline.trainer.checkpoint.strict_json import write_json


def save_as_ranks(path: str, held: list[list[Piece]], file_bytes: int = 2**30) -> str:
    """What the ranks of a job will do together: each its files and index, then one manifest."""
    storage, place = storage_of(path)
    ranks = len(held)
    with Draft(storage, place) as draft:
        trees = write_json({"extra": {}, "optimizer": None, "state": None})
        records = {"state.json": draft.claim("state.json", trees)}
        for rank, pieces in enumerate(held):
            files = {"model": into_files("model", pieces, file_bytes, rank, ranks)}
            index = write_json(index_record(files, {}, rank, ranks))
            storage.create(draft.path(index_name(rank, ranks)), index)
            records[index_name(rank, ranks)] = record_of(index)
            for name, content in files["model"].items():
                records[name] = write_blocks(storage, draft.path(name), file_buffers(content))
        indexes = [index_name(rank, ranks) for rank in range(ranks)]
        return draft.commit(manifest_bytes(encode_meta({"global_step": 1, "epoch": 0}), indexes, records))


def cut(name: str, tensor: Tensor, cuts: list[int], dim: int = 0) -> list[Piece]:
    """`tensor` cut along one dimension at these places."""
    edges = [0, *cuts, tensor.shape[dim]]
    pieces = []
    for start, stop in itertools.pairwise(edges):
        offset = [0] * tensor.dim()
        offset[dim] = start
        pieces.append(Piece(name, tensor.narrow(dim, start, stop - start), tuple(offset), tuple(tensor.shape)))
    return pieces


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_boxes_of_several_ranks_are_put_together(place: str, tmp_path: Path) -> None:
    folder = str(tmp_path) if place == "disk" else "memory://boxes"
    a, b, c = torch.randn(7, 3), torch.randn(2, 6, 2), torch.randn(5, dtype=torch.complex128)
    a0, a1, a2 = cut("a", a, [3, 4])
    b0, b1, b2 = cut("b", b, [1, 4], dim=1)
    (c0, c1) = cut("c", c, [2])
    whole = torch.ones(4)
    path = save_as_ranks(f"{folder}/x", [[a0, b2, c1], [b0, a1, Piece.whole("w", whole)], [c0, a2, b1]])
    assert verify(path) == []
    names = load(path).manifest.files
    assert "model-r00001-of-00003.safetensors" in names and "index-r00002-of-00003.json" in names
    loaded = load(path).model
    for name, tensor in {"a": a, "b": b, "c": c, "w": whole}.items():
        assert torch.equal(loaded[name], tensor), name


def test_one_rank_may_hold_several_boxes_of_a_tensor_in_several_files(tmp_path: Path) -> None:
    tensor = torch.randn(8, 2)
    first, second, third, fourth = cut("w", tensor, [2, 4, 6])
    path = save_as_ranks(str(tmp_path / "x"), [[first, third], [fourth, second]], file_bytes=16)
    assert "model-r00000-of-00002-00002-of-00002.safetensors" in load(path).manifest.files
    assert torch.equal(load(path).model["w"], tensor)


def test_a_rank_that_is_missing_or_twice_is_refused() -> None:
    tensor = torch.randn(4, 2)
    held = [[piece] for piece in cut("w", tensor, [2])]
    records = []
    for rank, pieces in enumerate(held):
        files = {"model": into_files("model", pieces, 2**30, rank, 2)}
        records.append((f"index {rank}", index_record(files, {}, rank, 2)))
    assert merge(records)["model"].tensors["w"].shape == (4, 2)
    for wrong in ([records[0]], [records[1], records[0]], [records[0], records[0]]):
        with pytest.raises(CheckpointError, match="is not the index of rank"):
            merge(wrong)
    alone = [(where, {**record, "rank": 0, "ranks": 1}) for where, record in records[:1]]
    with pytest.raises(CheckpointError, match="4 of its 8 numbers"):
        merge(alone)


def record(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> TensorRecord:
    found = [Box("f", f"k{i}", offset, size) for i, (offset, size) in enumerate(boxes)]
    return TensorRecord(torch.float32, shape, found)


@pytest.mark.parametrize(
    ("shape", "boxes", "reason"),
    [
        ((4,), [((0,), (3,))], "3 of its 4"),
        ((4,), [((0,), (3,)), ((2,), (2,))], "5 of its 4"),
        ((4,), [((0,), (2,)), ((1,), (2,))], "overlap"),
        ((2, 2), [((0, 0), (2, 1)), ((1, 0), (1, 1)), ((0, 1), (1, 1))], "overlap"),
        ((4,), [((3,), (4,))], "outside"),
        ((4,), [((0, 0), (4, 1))], "outside"),
        ((4,), [], "0 of its 4"),
        ((0,), [], "0 of its 0"),
        ((), [((), ()), ((), ())], "2 of its 1"),
    ],
)
def test_a_cover_that_is_not_exact_is_refused(shape: Any, boxes: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        check_cover(record(shape, boxes), "w")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_boxes_are_accepted_exactly_if_they_cover_each_number_once(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    boxes = []
    for _ in range(data.draw(st.integers(1, 4))):
        offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        boxes.append((offset, tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))))
    count = torch.zeros(shape, dtype=torch.int64)
    for offset, size in boxes:
        count[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))] += 1
    try:
        check_cover(record(shape, boxes), "w")
        accepted = True
    except CheckpointError:
        accepted = False
    assert accepted == bool((count == 1).all())
