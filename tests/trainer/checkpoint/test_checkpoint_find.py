"""The newest whole checkpoint is found, what is passed over is named, and pointers are followed safely."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
import torch

from paceline.errors import CheckpointError
from paceline.trainer.checkpoint import (
    blocks,
    find_newest,
    is_checkpoint,
    load,
    read_manifest,
    remove,
    resolve_pointer,
    save,
    verify,
    write_pointer,
)


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "disk" else f"memory://bucket/{uuid.uuid4().hex}"


def save_step(folder: str, step: int, name: str = "x") -> str:
    return save(f"{folder}/{name}", model={"w": torch.ones(9)}, meta={"global_step": step, "epoch": 0})


def test_the_greatest_step_is_the_newest_then_the_latest(folder: str) -> None:
    save_step(f"{folder}/a", 10)
    first = save_step(f"{folder}/b", 20)
    save_step(f"{folder}/a", 9)
    assert find_newest([f"{folder}/a", f"{folder}/b", f"{folder}/absent"]) == (first, [])
    again = save_step(f"{folder}/a", 20)
    assert find_newest([f"{folder}/b", f"{folder}/a"]) == (again, [])


def test_nothing_is_found_in_an_empty_or_absent_folder(folder: str) -> None:
    assert find_newest([folder, f"{folder}/absent"]) == (None, [])
    assert find_newest([]) == (None, [])


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)  # so that the header lies in other blocks than the damage
    good = save_step(str(tmp_path), 1)
    altered, unfinished = save_step(str(tmp_path), 3), save_step(str(tmp_path), 2)
    file = Path(altered, "model.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    Path(unfinished, "manifest.json").unlink()
    (tmp_path / "lightning.ckpt").write_text("a file of others")
    (tmp_path / "folder").mkdir()
    newest, skipped = find_newest([tmp_path])
    assert newest == good
    assert [path for path, _ in skipped] == [unfinished, altered]
    assert "no manifest.json" in skipped[0][1] and "model.safetensors was altered" in skipped[1][1]


def test_weights_alone_are_passed_over_where_a_run_is_to_go_on(tmp_path: Path) -> None:
    whole = save_step(str(tmp_path), 1)
    meta = {"global_step": 2, "epoch": 0, "weights_only": True}
    weights = save(tmp_path / "w", model={"w": torch.ones(9)}, meta=meta)
    assert find_newest([tmp_path]) == (weights, [])
    newest, skipped = find_newest([tmp_path], to_resume=True)
    assert newest == whole and skipped == [(weights, "it holds weights only, from which no run can go on")]


def test_is_checkpoint_looks_at_the_manifest_only(tmp_path: Path) -> None:
    path = save_step(str(tmp_path), 1)
    pointer = write_pointer(tmp_path / "last.ckpt", path)
    assert is_checkpoint(path) and not is_checkpoint(tmp_path) and not is_checkpoint(tmp_path / "absent")
    assert not is_checkpoint(pointer)


def test_a_pointer_is_followed_and_replaced(folder: str) -> None:
    first, second = save_step(folder, 1), save_step(folder, 2)
    pointer = write_pointer(f"{folder}/last.ckpt", first)
    assert pointer == f"{folder}/last.ckpt" and resolve_pointer(pointer) == first
    write_pointer(pointer, second)
    assert resolve_pointer(pointer) == second == resolve_pointer(f"{folder}/last")
    assert load(pointer).path == second and read_manifest(pointer).global_step == 2
    assert resolve_pointer(first) == first
    assert find_newest([folder]) == (second, [])


def test_a_pointer_to_what_is_gone_says_so(folder: str) -> None:
    path = save_step(folder, 1)
    pointer = write_pointer(f"{folder}/last.ckpt", path)
    remove(path)
    with pytest.raises(CheckpointError, match=r"x\.ckpt does not exist"):
        load(pointer)


def test_a_reader_of_a_pointer_sees_the_old_or_the_new_one_whole(tmp_path: Path) -> None:
    first, second = save_step(str(tmp_path), 1), save_step(str(tmp_path), 2)
    with open(write_pointer(tmp_path / "last.ckpt", first), "rb") as reader:
        write_pointer(tmp_path / "last.ckpt", second)
        assert json.loads(reader.read())["target"] == "x.ckpt"


def test_a_pointer_never_replaces_anything_else(tmp_path: Path) -> None:
    path = save_step(str(tmp_path), 1)
    (tmp_path / "other.ckpt").write_text("something of others")
    for taken in (path, tmp_path / "other.ckpt"):
        with pytest.raises(CheckpointError, match="is no pointer"):
            write_pointer(taken, path)
    with pytest.raises(CheckpointError, match="beside it"):
        write_pointer(tmp_path / "folder" / "last.ckpt", path)
    assert (tmp_path / "other.ckpt").read_text() == "something of others"


@pytest.mark.parametrize("target", ["../x", "/etc", "", ".", "..", ".tmp-x", "a/b", "a\\b", 3, None, ["x"]])
def test_a_pointer_that_leads_elsewhere_is_refused(tmp_path: Path, target: object) -> None:
    (tmp_path / "last.ckpt").write_text(
        json.dumps({"format": "paceline.pointer", "format_version": 1, "target": target})
    )
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        load(tmp_path / "last.ckpt")
    assert "last.ckpt" in verify(tmp_path / "last.ckpt")[0]


def test_a_pointer_to_a_pointer_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_text(json.dumps({"format": "paceline.pointer", "target": "last.ckpt"}))
    with pytest.raises(CheckpointError, match="is a file, and a checkpoint is a folder"):
        load(tmp_path / "last.ckpt")
