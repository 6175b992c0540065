"""Weights that others wrote are read without executing anything in them."""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch

from paceline.errors import CheckpointError
from paceline.trainer.checkpoint import load_weights_of, save, write_pointer

WEIGHTS = OrderedDict(w=torch.arange(6.0).reshape(2, 3), b=torch.ones(3, dtype=torch.bfloat16))


class AttributeDict(dict[str, Any]):
    """Like the class in which Lightning keeps hyper-parameters."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Unknown:
    def __init__(self) -> None:
        self.x = 3


def assert_weights(loaded: dict[str, Any]) -> None:
    assert loaded.keys() == WEIGHTS.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in WEIGHTS.items()
    )


def test_a_checkpoint_of_ours_gives_weights_and_hyper_parameters(tmp_path: Path) -> None:
    state = {"hyper_parameters": {"lr": 0.1, "sizes": (1, 2)}, "rng": torch.ones(9)}
    path = save(tmp_path / "x", model=WEIGHTS, state=state, meta={"global_step": 1, "epoch": 0})
    for way in (path, write_pointer(tmp_path / "last.ckpt", path)):
        read = load_weights_of(way)
        assert_weights(read.state_dict)
        assert read.hyper_parameters == {"lr": 0.1, "sizes": (1, 2)} and read.left_out == []
    path = save(tmp_path / "weights", model=WEIGHTS, meta={"global_step": 1, "epoch": 0})
    assert load_weights_of(path).hyper_parameters == {}


def test_a_safetensors_file_is_read(tmp_path: Path) -> None:
    safetensors.torch.save_file(WEIGHTS, tmp_path / "model.safetensors", metadata={"made": "elsewhere"})
    assert_weights(load_weights_of(tmp_path / "model.safetensors").state_dict)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        load_weights_of(tmp_path / "cut.safetensors")


def test_a_file_of_an_object_store_is_read(tmp_path: Path) -> None:
    torch.save(dict(WEIGHTS), tmp_path / "m.pt")
    with fsspec.open("memory://convert/m.pt", "wb") as file:
        file.write((tmp_path / "m.pt").read_bytes())
    assert_weights(load_weights_of("memory://convert/m.pt").state_dict)


def test_a_lightning_checkpoint_is_read_with_the_hyper_parameters_that_survive(tmp_path: Path) -> None:
    content = {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": WEIGHTS,
        "loops": {"fit": Unknown()},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}],
        "hparams_name": "kwargs",
        "hyper_parameters": AttributeDict(
            lr=0.1,
            sizes=[1, 2],
            nested=AttributeDict(a=1, path=pathlib.PurePosixPath("data")),
            arguments=argparse.Namespace(x=1),
            folder=pathlib.PurePosixPath("/data"),
            unknown=Unknown(),
            number=np.float64(0.5),
            partial=functools.partial(torch.nn.Linear, 3),
            layer_class=Unknown,
            several=[{"a": Unknown()}, 1],
        ),
    }
    torch.save(content, tmp_path / "lightning.ckpt")
    read = load_weights_of(tmp_path / "lightning.ckpt")
    assert_weights(read.state_dict)
    assert read.hyper_parameters == {"lr": 0.1, "sizes": [1, 2], "nested": {"a": 1}}
    unread = ["arguments", "folder", "layer_class", "nested.path", "number", "partial", "several", "unknown"]
    assert sorted(read.left_out) == unread


@pytest.mark.parametrize("old_format", [False, True])
def test_a_plain_state_dict_is_read(tmp_path: Path, old_format: bool) -> None:
    torch.save(WEIGHTS, tmp_path / "m.pt", _use_new_zipfile_serialization=not old_format)
    assert_weights(load_weights_of(tmp_path / "m.pt").state_dict)


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("call", [os.system, eval, exec])
def test_nothing_in_a_file_is_executed(tmp_path: Path, call: Any, old_format: bool) -> None:
    harm = f"touch {tmp_path / 'harm'}" if call is os.system else f"open({str(tmp_path / 'harm')!r}, 'w')"

    class Harm:
        def __reduce__(self) -> Any:
            return call, (harm,)

    content = {"state_dict": WEIGHTS, "hyper_parameters": {"x": Harm()}}
    torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=not old_format)
    try:
        read = load_weights_of(tmp_path / "m.ckpt")
    except CheckpointError as error:
        assert "m.ckpt cannot be read as weights without executing" in str(error)
    else:
        assert read.left_out == ["x"]
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02}", b"text", b"\x80\x02" + b"\xff" * 50])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.ckpt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"m\.ckpt"):
        load_weights_of(tmp_path / "m.ckpt")


@pytest.mark.parametrize("content", [[1, 2], {"model": {"w": 1}}, {"state_dict": 3}, torch.ones(2), {}])
def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"m\.pt (holds a|has no 'state_dict')"):
        load_weights_of(tmp_path / "m.pt")


def test_weights_that_are_absent_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_weights_of(tmp_path / "absent.ckpt")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_weights_of(tmp_path / "absent.safetensors")
