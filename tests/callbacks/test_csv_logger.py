"""`CSVLogger`, driven by direct calls; runs with a Trainer are in `test_loggers_in_runs.py`."""

from __future__ import annotations

import csv
import uuid
from pathlib import Path

import pytest
import torch
import yaml

from paceline.callbacks.csv_logger import CSVLogger
from paceline.callbacks.log_file import read_text
from paceline.errors import ConfigurationError


def rows(logger: CSVLogger) -> list[dict[str, str]]:
    text = read_text(logger.metrics_file_path) or ""
    return list(csv.DictReader(text.splitlines()))


def test_it_writes_into_a_numbered_folder_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine" / "version_4").mkdir(parents=True)
    logger = CSVLogger(tmp_path, name="mine")
    assert logger.version == 5
    assert logger.log_dir == str(tmp_path / "mine" / "version_5")
    assert logger.root_dir == str(tmp_path / "mine")
    assert CSVLogger(tmp_path).log_dir == str(tmp_path / "lightning_logs" / "version_0")
    assert CSVLogger(tmp_path, name="", version="trial").log_dir == str(tmp_path / "trial")


def test_the_header_grows_with_the_metrics(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 0.5, "epoch": 0, "samples": 32}, step=1)
    logger.save()
    logger.log_metrics({"loss": torch.tensor(0.25), "val_loss": 1.0, "epoch": 0, "samples": 64}, step=2)
    logger.save()
    text = (read_text(logger.metrics_file_path) or "").splitlines()
    assert text[0] == "step,epoch,samples,loss,val_loss"
    assert [(r["step"], r["loss"], r["val_loss"]) for r in rows(logger)] == [("1", "0.5", ""), ("2", "0.25", "1.0")]


def test_rows_wait_for_flush_logs_every_n_steps(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=10)
    logger.log_metrics({"loss": 1.0}, step=1)
    assert rows(logger) == []
    logger.log_metrics({"loss": 1.0}, step=10)
    assert len(rows(logger)) == 2
    logger.log_metrics({"loss": 1.0}, step=19)
    assert len(rows(logger)) == 2
    logger.finalize("success")
    assert len(rows(logger)) == 3


def test_a_row_without_a_step_carries_its_number(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    for _ in range(3):
        logger.log_metrics({"loss": 1.0})
    assert [r["step"] for r in rows(logger)] == ["0", "1", "2"]


def test_names_with_commas_and_texts_with_line_feeds_stay_in_their_cells(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a,b": 1.0, "text": "x\ny"}, step=1)
    logger.save()
    assert rows(logger) == [{"step": "1", "a,b": "1.0", "text": "x y"}]


def test_the_prefix_is_put_before_each_name(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, prefix="tmp")
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.save()
    assert "tmp-loss" in rows(logger)[0]


@pytest.mark.parametrize("counted", [True, False])
def test_resuming_cuts_and_goes_on_under_the_same_header(tmp_path: Path, counted: bool) -> None:
    logger = CSVLogger(tmp_path, version="a")
    logger.log_metrics({"loss": 1.0}, step=50)
    logger.log_metrics({"loss": 0.9}, step=100)
    state = logger.state_dict()
    logger.log_metrics({"loss": 0.8, "late": 3.0}, step=150)
    logger.save()

    resumed = CSVLogger(tmp_path, version="a")
    resumed.resume_from(100, state["points"] if counted else None)
    resumed.log_metrics({"loss": 0.8, "later": 4.0}, step=150)
    resumed.save()
    assert [(r["step"], r["loss"], r["later"]) for r in rows(resumed)] == [
        ("50", "1.0", ""),
        ("100", "0.9", ""),
        ("150", "0.8", "4.0"),
    ]


def test_a_second_process_appends_to_what_is_there(tmp_path: Path) -> None:
    first = CSVLogger(tmp_path, version="a")
    first.log_metrics({"loss": 1.0}, step=1)
    first.finalize("success")
    second = CSVLogger(tmp_path, version="a")
    second.log_metrics({"test_loss": 2.0}, step=1)
    second.finalize("success")
    assert [(r["loss"], r["test_loss"]) for r in rows(second)] == [("1.0", ""), ("", "2.0")]


def test_it_writes_to_a_store(tmp_path: Path) -> None:
    logger = CSVLogger(f"memory://{uuid.uuid4()}", name="x")
    assert logger.version == 0
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.log_hyperparams({"lr": 0.1})
    logger.finalize("success")
    assert len(rows(logger)) == 1
    assert yaml.safe_load(read_text(f"{logger.log_dir}/hparams.yaml") or "") == {"lr": 0.1}


def test_the_experiment_is_the_writer(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.experiment.log_metrics({"mine": 1.0}, step=3)
    logger.experiment.save()
    assert rows(logger) == [{"step": "3", "mine": "1.0"}]


def test_flushing_never_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="flush_logs_every_n_steps=0"):
        CSVLogger(tmp_path, flush_logs_every_n_steps=0)
