"""What is saved is what is loaded, on a disk and on an object store; the files are what they promise to be."""

from __future__ import annotations

import errno
import json
import os
import uuid
import zlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from paceline.errors import CheckpointError
from paceline.trainer.checkpoint import blocks, load, read_manifest, remove, save, strict_json, verify
from paceline.trainer.checkpoint import storage as storage_module
from paceline.trainer.checkpoint.tensors import bytes_of, host_tensor

META = {"global_step": 7, "epoch": 2, "world_size": 3, "note": ("x", float("inf"))}


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "disk" else f"memory://bucket/{uuid.uuid4().hex}"


def example_model() -> dict[str, Tensor]:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "plain": base,
        "tied": base,
        "transposed": base.t(),
        "row": base[1],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 5),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "complex": torch.randn(2, 2, dtype=torch.complex128),
        "expanded": torch.ones(1, 1).expand(3, 2),
        "parameter": nn.Parameter(torch.randn(5)),
    }


def assert_same(loaded: dict[str, Any], saved: dict[str, Any]) -> None:
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(loaded[name], tensor.detach(), rtol=0, atol=0, check_stride=False)


def test_what_is_saved_is_loaded(folder: str) -> None:
    model, optimizer, state = example_model(), [{"lr": torch.tensor(0.1)}], {"loops": {"step": 7}, "x": torch.ones(2)}
    path = save(f"{folder}/a/b", model=model, optimizer=optimizer, state=state, meta=META)
    assert path == f"{folder}/a/b.ckpt"
    loaded = load(path)
    assert_same(loaded.model, model)
    assert loaded.model["tied"] is loaded.model["plain"]
    assert loaded.optimizer == optimizer and loaded.state["loops"] == {"step": 7}
    assert loaded.meta == META
    assert (loaded.manifest.global_step, loaded.manifest.epoch, loaded.manifest.world_size) == (7, 2, 3)
    assert loaded.manifest.libraries["torch"] == torch.__version__
    assert verify(path) == []


def test_a_path_may_lack_its_suffix_and_be_a_path_object_or_a_file_url(tmp_path: Path) -> None:
    path = save(tmp_path / "x", model=example_model(), meta=META)
    assert load(tmp_path / "x").path == path == load(f"file://{tmp_path}/x.ckpt").path == load(f"{path}/").path


def test_weights_alone_have_no_optimizer_and_no_state(folder: str) -> None:
    loaded = load(save(f"{folder}/w", model=example_model(), meta=META))
    assert loaded.optimizer is None and loaded.state is None


def test_weights_are_read_without_the_other_files(tmp_path: Path) -> None:
    path = save(tmp_path / "x", model=example_model(), optimizer={"m": torch.ones(4)}, meta=META)
    file = Path(path, "optimizer.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    loaded = load(path)
    assert_same(loaded.model, example_model() | {k: loaded.model[k] for k in ("complex", "parameter")})
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors was altered"):
        loaded.optimizer


def test_safetensors_opens_the_weights(tmp_path: Path) -> None:
    model = {name: tensor for name, tensor in example_model().items() if name != "complex"}
    path = save(tmp_path / "x", model=model, meta=META)
    opened = safetensors.torch.load_file(Path(path, "model.safetensors"))
    assert_same(opened | {"tied": opened["plain"]}, model)


def test_dtypes_of_safetensors_come_back_through_its_own_loader(tmp_path: Path) -> None:
    model = {str(d): torch.ones(3).to(d) for d in safetensors.torch._TYPES.values()}
    path = save(tmp_path / "x", model=model, meta=META)
    opened = safetensors.torch.load_file(Path(path, "model.safetensors"))
    for name, tensor in load(path).model.items():
        assert torch.equal(tensor.view(torch.uint8), model[name].view(torch.uint8)), name
        assert torch.equal(opened[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_large_parts_are_cut_into_numbered_files(folder: str) -> None:
    model = {f"w{i}": torch.full((10,), float(i)) for i in range(5)} | {"big": torch.ones(100)}
    path = save(f"{folder}/x", model=model, meta=META, file_bytes=80)
    names = [name for name in read_manifest(path).files if name.startswith("model")]
    assert names == [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    assert_same(load(path).model, model)


def test_extra_state_of_modules_that_is_no_tensor_is_kept(folder: str) -> None:
    model = {"w": torch.ones(2), "norm._extra_state": {"seen": 3, "mean": torch.zeros(2)}}
    loaded = load(save(f"{folder}/x", model=model, meta=META)).model
    assert loaded["norm._extra_state"]["seen"] == 3
    assert torch.equal(loaded["norm._extra_state"]["mean"], torch.zeros(2)) and list(loaded) == list(model)


def test_a_taken_name_gets_a_version_and_what_is_there_stays(folder: str) -> None:
    first = save(f"{folder}/x.ckpt", model={"w": torch.ones(1)}, meta=META)
    second = save(f"{folder}/x.ckpt", model={"w": torch.zeros(1)}, meta=META)
    third = save(f"{folder}/x", model={"w": torch.zeros(1)}, meta=META)
    assert [second, third] == [f"{folder}/x-v1.ckpt", f"{folder}/x-v2.ckpt"]
    assert load(first).model["w"].item() == 1


def test_files_and_empty_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_text("a checkpoint of another tool")
    (tmp_path / "x-v1.ckpt").mkdir()
    assert save(tmp_path / "x", model={}, meta=META) == str(tmp_path / "x-v2.ckpt")
    assert (tmp_path / "x.ckpt").read_text() == "a checkpoint of another tool"
    assert list((tmp_path / "x-v1.ckpt").iterdir()) == []


def test_each_block_has_its_own_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    model = example_model() | {"long": torch.randn(1000)}
    path = save(tmp_path / "x", model=model, meta=META)
    data = Path(path, "model.safetensors").read_bytes()
    record = read_manifest(path).files["model.safetensors"]
    assert list(record.crc32) == [zlib.crc32(data[i : i + 100]) for i in range(0, len(data), 100)]
    assert_same(load(path).model, model)
    assert verify(path) == []


def test_each_block_is_read_and_summed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "x", model={f"w{i}": torch.randn(50) for i in range(200)}, meta=META)
    read: list[int] = []
    fill = blocks.BlockReader._fill

    def counted(self: blocks.BlockReader, view: memoryview, start: int) -> None:
        read.append(len(view))
        fill(self, view, start)

    monkeypatch.setattr(blocks.BlockReader, "_fill", counted)
    load(path).model
    assert sum(read) == sum(file.stat().st_size for file in Path(path).iterdir())


def test_pieces_worth_a_thread_get_the_same_checksums(tmp_path: Path) -> None:
    path = save(tmp_path / "x", model={"a": torch.randn(5_000_000), "b": torch.randn(100_000)}, meta=META)
    data = Path(path, "model.safetensors").read_bytes()
    record = read_manifest(path).files["model.safetensors"]
    assert list(record.crc32) == [zlib.crc32(data[i : i + 2**24]) for i in range(0, len(data), 2**24)]
    assert verify(path) == []


def test_a_plain_tensor_is_written_from_its_own_memory() -> None:
    tensor = torch.zeros(4)
    view = bytes_of(host_tensor(tensor))
    tensor[1] = 1
    assert bytes(view) == bytes(4) + b"\x00\x00\x80\x3f" + bytes(8)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    loaded = load(save(tmp_path / "x", model=example_model(), meta=META))
    assert loaded.model["tied"] is loaded.model["plain"]


def test_one_item_of_the_state_is_read_without_the_tensors_of_the_rest(tmp_path: Path) -> None:
    state = {"hyper_parameters": {"lr": 0.1, "w": torch.ones(2)}, "big": torch.ones(100)}
    loaded = load(save(tmp_path / "x", model={}, state=state, meta=META))
    assert loaded.state_item("hyper_parameters")["lr"] == 0.1
    assert torch.equal(loaded.state_item("hyper_parameters")["w"], torch.ones(2))
    assert loaded.state_item("absent") is None


def test_a_removed_checkpoint_is_gone_and_only_checkpoints_are_removed(folder: str) -> None:
    path = save(f"{folder}/x", model=example_model(), meta=META)
    other = save(f"{folder}/y", model=example_model(), meta=META)
    remove(path)
    assert not storage_module.storage_of(path)[0].exists(path)
    assert verify(other) == []
    with pytest.raises(CheckpointError, match="does not exist"):
        remove(path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        remove(folder)
    assert verify(other) == []


def test_a_module_and_its_tied_weights_load_strictly(folder: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight
            self.norm = nn.BatchNorm1d(3)

    saved, fresh = Tied(), Tied()
    path = save(f"{folder}/m", model=saved.state_dict(), meta=META)
    fresh.load_state_dict(load(path).model, strict=True)
    assert_same(dict(fresh.state_dict()), saved.state_dict())


def test_meta_must_be_complete_and_hold_no_tensors_and_nothing_is_written_before_it_is(tmp_path: Path) -> None:
    for meta, reason in (
        ({"epoch": 0}, "global_step"),
        ({"global_step": 1.0, "epoch": 0}, "global_step"),
        ({"global_step": 1, "epoch": 0, "x": torch.ones(1)}, "meta.x is a tensor"),
        ({"global_step": 1, "epoch": 0, "x": {1}}, "meta.x is of type set"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            save(tmp_path / "x", model={}, meta=meta)
    with pytest.raises(CheckpointError, match=r"model\.w is a tensor that is on the meta device"):
        save(tmp_path / "x", model={"w": torch.ones(1, device="meta")}, meta=META)
    with pytest.raises(CheckpointError, match="reserved"):
        save(tmp_path / "x", model={"__metadata__": torch.ones(1)}, meta=META)
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_a_tensor_that_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="UTF-8"):
        save(tmp_path / "x", model={"\ud800": torch.ones(1)}, meta=META)
    assert list(tmp_path.iterdir()) == []


def test_no_permission_names_path_and_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: str, path: str) -> None:  # as the system does, but to root too
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(storage_module, "changing", refuse)
    with pytest.raises(CheckpointError, match=r"x could not be saved: Permission denied"):
        save(tmp_path / "x", model={}, meta=META)


def test_a_file_where_a_folder_should_be_names_path_and_cause(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"x could not be saved: .*(Not a directory|File exists)"):
        save(tmp_path / "file" / "x", model={}, meta=META)


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    path = save(tmp_path / "x", model={"w": torch.ones(2)}, meta=META)
    record = json.loads(Path(path, "manifest.json").read_bytes())
    assert record["format"] == "paceline.checkpoint" and record["format_version"] == 1
    assert record["files"]["model.safetensors"]["size"] == Path(path, "model.safetensors").stat().st_size
    assert set(record["files"]) == {"index.json", "state.json", "model.safetensors"}


def test_trees_larger_than_a_reader_takes_are_refused_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strict_json.write_json, "__defaults__", ("", 1000))
    with pytest.raises(CheckpointError, match=r"state\.json would have \d+ bytes, the limit is 1000"):
        save(tmp_path / "x", model={}, state=[1] * 1000, meta=META)
    assert list(tmp_path.iterdir()) == []
