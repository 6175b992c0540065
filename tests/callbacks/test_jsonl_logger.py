"""`JSONLLogger`, driven by direct calls; runs with a Trainer are in `test_loggers_in_runs.py`."""

from __future__ import annotations

import json
import math
import uuid
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from paceline.callbacks.jsonl_logger import JSONLLogger
from paceline.callbacks.log_file import read_text
from paceline.errors import ConfigurationError


def points(path: Path | str) -> list[dict]:
    text = read_text(str(path)) or ""
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_a_point_has_step_epoch_samples_time_and_then_the_metrics(tmp_path: Path) -> None:
    logger = JSONLLogger(tmp_path)
    logger.log_metrics({"loss": 0.5, "acc": 1, "epoch": 3, "samples": 320}, step=10)
    (point,) = points(tmp_path / "metrics.jsonl")  # there although nothing was closed or saved
    assert list(point) == ["step", "epoch", "samples", "time", "loss", "acc"]
    assert (point["step"], point["epoch"], point["samples"], point["loss"], point["acc"]) == (10, 3, 320, 0.5, 1)
    assert point["time"] > 1.6e9


def test_values_keep_all_digits(tmp_path: Path) -> None:
    logger = JSONLLogger(tmp_path)
    logger.log_metrics({"loss": 0.1 + 0.2, "big": 1e300}, step=1)
    assert points(tmp_path / "metrics.jsonl")[0]["loss"] == 0.1 + 0.2


def test_non_finite_floats_are_words_that_float_takes_back(tmp_path: Path) -> None:
    logger = JSONLLogger(tmp_path)
    logger.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5}, step=1)
    (point,) = points(tmp_path / "metrics.jsonl")
    assert (point["a"], point["b"], point["c"], point["d"]) == ("NaN", "Infinity", "-Infinity", 1.5)
    assert math.isnan(float(point["a"]))
    assert float(point["c"]) == -math.inf


def test_tensors_and_numpy_scalars_become_numbers(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    logger = JSONLLogger(tmp_path)
    logger.log_metrics({"a": torch.tensor(2.5), "b": numpy.float32(0.5), "c": numpy.int64(3)}, step=1)
    (point,) = points(tmp_path / "metrics.jsonl")
    assert (point["a"], point["b"], point["c"]) == (2.5, 0.5, 3)


def test_resuming_cuts_what_came_after_the_saved_points(tmp_path: Path) -> None:
    logger = JSONLLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=50)
    logger.log_metrics({"loss": 0.9}, step=100)
    state = logger.state_dict()
    logger.log_metrics({"val_loss": 2.0}, step=100)  # validated after the save: runs again
    logger.log_metrics({"loss": 0.8}, step=150)

    resumed = JSONLLogger(tmp_path)
    resumed.resume_from(100, state["points"])
    resumed.log_metrics({"val_loss": 2.0}, step=100)
    found = [(p["step"], p.get("loss"), p.get("val_loss")) for p in points(tmp_path / "metrics.jsonl")]
    assert found == [(50, 1.0, None), (100, 0.9, None), (100, None, 2.0)]


def test_resuming_without_a_count_cuts_after_the_step(tmp_path: Path) -> None:
    logger = JSONLLogger(tmp_path)
    for step in (50, 100, 150):
        logger.log_metrics({"loss": 1.0}, step=step)
    logger.log_metrics({"note": 1.0})
    JSONLLogger(tmp_path).resume_from(100)
    assert [p["step"] for p in points(tmp_path / "metrics.jsonl")] == [50, 100, None]


def test_a_store_has_all_points_of_a_saved_state(tmp_path: Path) -> None:
    root = f"memory://{uuid.uuid4()}"
    logger = JSONLLogger(root)
    logger.log_metrics({"loss": 1.0}, step=1)
    state = logger.state_dict()
    logger.log_metrics({"loss": 2.0}, step=2)
    assert [p["step"] for p in points(f"{root}/metrics.jsonl")] == [1]
    logger.finalize("success")
    assert [p["step"] for p in points(f"{root}/metrics.jsonl")] == [1, 2]
    again = JSONLLogger(root)
    again.resume_from(1, state["points"])
    assert [p["step"] for p in points(f"{root}/metrics.jsonl")] == [1]


def test_more_can_be_logged_after_the_end(tmp_path: Path) -> None:
    logger = JSONLLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.finalize("success")
    logger.log_metrics({"test_loss": 1.0}, step=1)
    assert len(points(tmp_path / "metrics.jsonl")) == 2


def test_hyper_parameters_are_plain_json(tmp_path: Path) -> None:
    logger = JSONLLogger(tmp_path)
    logger.log_hyperparams(Namespace(lr=0.1, path=Path("/data"), sizes=(1, 2), dtype=torch.float16))
    logger.log_hyperparams({"nested": {"inf": math.inf, 3: True}})
    hparams = json.loads((tmp_path / "hparams.json").read_text())
    assert hparams == {
        "lr": 0.1,
        "path": "/data",
        "sizes": [1, 2],
        "dtype": "torch.float16",
        "nested": {"inf": "Infinity", "3": True},
    }


def test_logging_before_any_run_says_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match=r"belongs to no trainer yet.*JSONLLogger\(save_dir="):
        JSONLLogger().log_metrics({"loss": 1.0}, step=1)


def test_the_version_is_the_number_of_the_runs_folder(tmp_path: Path) -> None:
    assert JSONLLogger(tmp_path / "version_7").version == 7
    assert JSONLLogger(tmp_path / "my_run").version == "my_run"
    assert JSONLLogger().version is None
