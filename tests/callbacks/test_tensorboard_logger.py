"""`TensorBoardLogger`: what it writes, read back with TensorBoard's own reader."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from paceline.callbacks.tensorboard_logger import TensorBoardLogger
from paceline.errors import ConfigurationError

pytest.importorskip("tensorboard")


def scalars(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_numbers_become_scalars_at_their_steps(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": 0.5, "epoch": 0}, step=50)
    logger.log_metrics({"loss": torch.tensor(0.25), "epoch": 0}, step=100)
    logger.finalize("success")
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "version_0")
    assert scalars(logger.log_dir) == {"loss": [(50, 0.5), (100, 0.25)], "epoch": [(50, 0), (100, 0)]}


def test_prefix_name_version_and_sub_dir(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="mine", version="a", prefix="p", sub_dir="part")
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.save()
    assert logger.log_dir == str(tmp_path / "mine" / "a" / "part")
    assert scalars(logger.log_dir) == {"p-loss": [(1, 1.0)]}


def test_a_dict_becomes_several_curves_of_one_chart(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": {"train": 1.0, "val": 2.0}}, step=1)
    logger.finalize("success")
    assert scalars(Path(logger.log_dir) / "loss_train") == {"loss": [(1, 1.0)]}


def test_what_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"text='a' \(str\)"):
        TensorBoardLogger(tmp_path).log_metrics({"text": "a"}, step=1)


def hparams_in(folder: str) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(folder)
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    info = HParamsPluginData.FromString(content).session_start_info
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in info.hparams.items()}


def test_hyper_parameters_stand_in_the_table_and_beside_it(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1, "net": {"width": 4, "act": torch.nn.ReLU}})
    logger.finalize("success")
    assert hparams_in(logger.log_dir) == {"lr": 0.1, "net/width": 4, "net/act": str(torch.nn.ReLU)}
    assert scalars(logger.log_dir)["hp_metric"] == [(0, -1.0)]
    assert yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())["net"]["width"] == 4


def test_hyper_parameters_with_numbers_of_their_own(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1}, metrics={"best": 0.75}, step=7)
    logger.finalize("success")
    assert scalars(logger.log_dir) == {"best": [(7, 0.75)]}
    quiet = TensorBoardLogger(tmp_path, default_hp_metric=False)
    quiet.log_hyperparams({"lr": 0.1})
    quiet.finalize("success")
    assert scalars(quiet.log_dir) == {}


def test_the_experiment_is_torchs_writer_and_gets_its_options(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    logger = TensorBoardLogger(tmp_path, filename_suffix=".mine", max_queue=3)
    assert isinstance(logger.experiment, SummaryWriter)
    assert logger.experiment is logger.experiment
    logger.experiment.add_scalar("x", math.pi, 1)
    logger.finalize("success")
    assert [p.suffix for p in Path(logger.log_dir).glob("events*")] == [".mine"]


def test_a_missing_tensorboard_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.callbacks.tensorboard_logger.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"paceline\[tensorboard\]"):
        TensorBoardLogger(tmp_path)
    assert importlib.util.find_spec("tensorboard") is not None


class Example(torch.nn.Linear):
    example_input_array: Any = torch.zeros(2, 3)
    device = torch.device("cpu")


def test_the_graph_is_written_only_when_asked_for(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for log_graph in (True, False):
        logger = TensorBoardLogger(tmp_path, log_graph=log_graph)
        logger.log_graph(Example(3, 1))  # type: ignore[arg-type]
        logger.log_metrics({"a": 1.0}, 1)
        logger.finalize("success")
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        found[log_graph] = events.Tags()["graph"]
    assert found == {True: True, False: False}


def test_a_graph_without_an_example_is_told(tmp_path: Path) -> None:
    module = Example(3, 1)
    module.example_input_array = None
    with pytest.warns(UserWarning, match="example_input_array"):
        TensorBoardLogger(tmp_path, log_graph=True).log_graph(module)  # type: ignore[arg-type]
