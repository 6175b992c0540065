"""`paceline checkpoint`: each action on real checkpoints, its JSON and its exit code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import paceline as pl
from paceline.trainer.checkpoint import load, save, write_pointer
from paceline.trainer.cli import main

from helpers.resumable import every_save, run, saved_in


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    run("sgd_momentum_by_step", tmp_path / "runs", callbacks=every_save(), max_steps=3)
    return tmp_path / "runs"


def said(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> Any:
    """What the command printed as JSON."""
    capsys.readouterr()
    assert main(["checkpoint", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_ls_lists_what_is_below_a_folder(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = saved_in(runs)[0]
    os.remove(f"{first}/model.safetensors")
    listed = said(capsys, "ls", runs)
    assert sorted(one["path"] for one in listed) == saved_in(runs)
    assert {one["path"]: one["problem"] for one in listed}[first] == "model.safetensors is missing"
    assert {one["step"] for one in listed} == {1, 2, 3}
    main(["checkpoint", "ls", str(runs)])
    assert "whole" in capsys.readouterr().out


def test_names_in_brackets_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save("[red] run [bold]", model={"w[/b]": torch.ones(2)}, meta={"global_step": 1, "epoch": 0})
    main(["checkpoint", "ls", "."])
    main(["checkpoint", "show", "[red] run [bold].ckpt"])
    printed = capsys.readouterr().out
    assert "[red] run [bold].ckpt" in printed and "w[/b]" in printed


def test_show_tells_facts_and_tensors(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "show", saved_in(runs)[1])
    assert told["step"] == 2 and told["version of torch"].startswith("2.")
    shapes = {tensor["name"]: tensor["shape"] for tensor in told["tensors"] if tensor["part"] == "model"}
    assert shapes["net.0.weight"] == [8, 6]
    assert main(["checkpoint", "show", saved_in(runs)[1]]) == 0
    assert "net.0.weight" in capsys.readouterr().out


def test_verify_reads_every_byte(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved_in(runs)[0]
    assert said(capsys, "verify", path) == {"whole": True, "problems": []}
    weights = Path(path, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    told = said(capsys, "verify", path, code=1)
    assert not told["whole"] and "model.safetensors was altered" in told["problems"][0]


def test_diff_names_what_differs_and_by_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = {"global_step": 1, "epoch": 0}
    one = save(tmp_path / "one", model={"a": torch.ones(3), "b": torch.ones(2)}, state={"x": [1, 2]}, meta=meta)
    changed = torch.tensor([1.0, 1.5, 1.0])
    other = save(tmp_path / "other", model={"a": changed, "c": torch.ones(2)}, state={"x": [1, 3]}, meta=meta)
    assert said(capsys, "diff", one, other, code=1) == [
        {"part": "model", "name": "a", "how": "1 of 3 numbers", "largest": 0.5},
        {"part": "model", "name": "b", "how": "only in the first", "largest": None},
        {"part": "model", "name": "c", "how": "only in the second", "largest": None},
        {"part": "state", "name": "x", "how": "[1, 2] and [1, 3]", "largest": None},
    ]
    assert said(capsys, "diff", one, one) == []


def test_consolidate_writes_whole_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = {"global_step": 1, "epoch": 0}
    model = {str(i): torch.randn(100) for i in range(5)}
    shards = save(tmp_path / "shards", model=model, state={"x": torch.ones(2)}, meta=meta, file_bytes=1000)
    assert len(list(Path(shards).glob("model-*"))) == 3
    whole = said(capsys, "consolidate", shards, tmp_path / "whole")["path"]
    assert Path(whole, "model.safetensors").exists() and load(whole).meta["global_step"] == 1
    assert said(capsys, "diff", shards, whole) == []


def test_export_writes_what_from_pretrained_reads(runs: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    words = ["export", saved_in(runs)[0], tmp_path / "out", "--prefix", "net.", "--config", tmp_path / "config.json"]
    path = said(capsys, *words)["path"]
    weights = load_file(path)
    model = load(saved_in(runs)[0]).model
    assert {f"net.{name}" for name in weights} == set(model)
    assert torch.equal(weights["0.weight"], model["net.0.weight"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert main(["checkpoint", *map(str, words)]) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["BertModel", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_transformers_reads_what_export_wrote(kind: str, tmp_path: Path, capsys: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    small = {
        "BertModel": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
        "GPT2LMHeadModel": {"n_embd": 16, "n_layer": 2, "n_head": 2},  # its head is tied to its embedding
        "T5ForConditionalGeneration": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    }
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(vocab_size=50, **small[kind])).eval()
    module = pl.Module()
    module.model = model
    path = save(tmp_path / "a.ckpt", model=module.state_dict(), meta={"global_step": 1, "epoch": 0})
    model.config.to_json_file(tmp_path / "config.json")
    words = ["export", path, tmp_path / "out", "--prefix", "model.", "--config", tmp_path / "config.json"]
    said(capsys, *words)
    read, told = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    assert read.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


def test_import_reads_a_lightning_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 2,
        "global_step": 30,
        "pytorch-lightning_version": "2.6.1",
        "state_dict": layer.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": {"lr": 0.1},
    }
    torch.save(content, tmp_path / "theirs.ckpt")
    loaded = load(said(capsys, "import", tmp_path / "theirs.ckpt", tmp_path / "ours")["path"])
    assert torch.equal(loaded.model["weight"], layer.weight)
    assert loaded.meta["global_step"] == 30 and loaded.state["hyper_parameters"] == {"lr": 0.1}
    averages = loaded.optimizer[0]["state"]["bias"]["exp_avg"]
    assert torch.equal(averages, optimizer.state[layer.bias]["exp_avg"])


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer_states": 5},
        {"optimizer_states": [{"state": None, "param_groups": [{"params": [0]}]}]},
        {"optimizer_states": [{"state": {3: {}}, "param_groups": [{"params": [0]}]}]},
        {"optimizer_states": [{"state": {}, "param_groups": [{"params": ["a", 0]}]}]},
    ],
)
def test_import_leaves_out_optimizers_that_make_no_sense(
    tmp_path: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, "global_step": 3, **change}, tmp_path / "theirs.ckpt")
    told = said(capsys, "import", tmp_path / "theirs.ckpt", tmp_path / "ours")
    assert told["left_out"] == ["optimizer_states"]
    loaded = load(tmp_path / "ours.ckpt")
    assert loaded.optimizer is None and loaded.meta["global_step"] == 3


def test_ls_follows_a_pointer_and_tells_what_is_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["checkpoint", "ls", "empty"]) == 0
    assert capsys.readouterr().out == "No checkpoint in empty or below.\n"
    path = save("x", model={"w": torch.ones(2)}, meta={"global_step": 1, "epoch": 0})
    (listed,) = said(capsys, "ls", write_pointer("last.ckpt", path))
    assert (listed["path"], listed["problem"]) == (path, "")
    os.remove("x.ckpt/manifest.json")
    (listed,) = said(capsys, "ls", ".")
    assert listed["step"] is None and "no manifest.json" in listed["problem"]
    main(["checkpoint", "ls", "."])
    assert capsys.readouterr().out.split()[7:11] == ["x.ckpt", "it", "has", "no"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("show absent", "absent does not exist"),
        ("ls absent", "absent does not exist"),
        ("ls config.json", "config.json cannot be read: Not a directory"),
        ("show config.json", "is a file, and a checkpoint is a folder"),
        ("show nosuch://x", "nosuch://x cannot be reached: Protocol not known"),
        ("diff x.ckpt absent", "absent does not exist"),
        ("consolidate x.ckpt config.json/y", "config.json/y could not be saved"),
        ("export x.ckpt out --config absent.json", "absent.json does not exist"),
        ("export x.ckpt config.json", "config.json/model.safetensors could not be written"),
        ("export x.ckpt out --prefix z.", "no weight whose name begins with 'z.'"),
        ("import x.ckpt y", "x.ckpt is a checkpoint of ours already"),
        ("import last y", "last is a checkpoint of ours already"),
        ("import config.json y", "config.json cannot be read as weights"),
        ("import odd.ckpt y", "odd.ckpt: 'epoch' is 'x', expected int"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    words: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pointer("last.ckpt", save("x", model={"w": torch.ones(2)}, meta={"global_step": 1, "epoch": 0}))
    Path("config.json").write_text("{}")
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": "x"}, "odd.ckpt")
    assert main(["checkpoint", *words.split()]) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not Path("out").exists() and not Path("y.ckpt").exists()
