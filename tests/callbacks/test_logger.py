"""`Logger`: the base, and what the loggers share."""

from __future__ import annotations

import copy
import pickle
from argparse import Namespace
from typing import Any

import pytest
import torch

import paceline as pl
from paceline.callbacks.folder_logger import next_version, run_version, version_folder
from paceline.callbacks.log_values import add_prefix, flatten, jsonable, plain_number
from paceline.callbacks.logger import DummyExperiment, Logger, hparams_of, rank_zero_experiment
from paceline.errors import ConfigurationError


def test_a_logger_must_say_how_it_writes() -> None:
    class Silent(Logger):
        pass

    with pytest.raises(TypeError, match="log_metrics"):
        Silent()  # type: ignore[abstract]


def test_a_logger_needs_no_more_than_log_metrics() -> None:
    class Mine(Logger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            pass

    logger = Mine()
    assert logger.name == "Mine"
    assert logger.version is None
    assert logger.save_dir is None
    assert logger.log_dir is None


def test_the_experiment_of_other_ranks_swallows_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    class Holder:
        @property
        @rank_zero_experiment
        def experiment(self) -> str:
            return "real"

    monkeypatch.setenv("RANK", "1")
    dummy = Holder().experiment
    assert isinstance(dummy, DummyExperiment)
    dummy.config.update({"a": 1})
    dummy["x"] = 1
    assert dummy["x"].add_scalar("a", 1, 2).more is dummy
    with dummy.run() as inner:
        inner.log({})
    copy.copy(dummy)
    pickle.loads(pickle.dumps(dummy))
    monkeypatch.setenv("RANK", "0")
    assert Holder().experiment == "real"


class Model(pl.Module):
    def __init__(self, logs: bool = True, **hparams: Any) -> None:
        super().__init__()
        if hparams:
            self.save_hyperparameters(hparams, logger=logs)


class Data(pl.DataModule):
    def __init__(self, logs: bool = True, **hparams: Any) -> None:
        super().__init__()
        self.save_hyperparameters(hparams, logger=logs)


def test_hyper_parameters_of_module_and_data_module_are_joined() -> None:
    assert hparams_of(Model(lr=0.1), Data(batch_size=4)) == {"lr": 0.1, "batch_size": 4}
    assert hparams_of(Model(lr=0.1), None) == {"lr": 0.1}
    assert hparams_of(Model(False, lr=0.1), Data(batch_size=4)) == {"batch_size": 4}
    assert hparams_of(Model(), None) is None
    assert hparams_of(Model(size=4), Data(size=4)) == {"size": 4}


def test_hyper_parameters_that_differ_are_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"\['size'\], with different values"):
        hparams_of(Model(size=4, lr=1), Data(size=5))
    with pytest.raises(ConfigurationError, match="weights"):
        hparams_of(Model(weights=torch.ones(2)), Data(weights=torch.ones(2)))


def test_plain_values() -> None:
    assert plain_number(torch.tensor(3)) == 3
    assert plain_number("text") == "text"
    assert add_prefix({"a": 1}, "p") == {"p-a": 1}
    assert add_prefix({"a": 1}, "") == {"a": 1}
    assert flatten({"a": {"b": 1, "c": Namespace(d=2)}, "e": {}}) == {"a/b": 1, "a/c/d": 2, "e": {}}
    assert jsonable({"t": torch.tensor(1.5), "s": {1}, "o": len}) == {"t": 1.5, "s": [1], "o": str(len)}


def test_versions_of_folders(tmp_path: Any) -> None:
    assert next_version(str(tmp_path / "none")) == 0
    for name in ("version_2", "version_10", "version_x", "other"):
        (tmp_path / name).mkdir()
    assert next_version(str(tmp_path)) == 11
    assert version_folder(3) == "version_3"
    assert version_folder("mine") == "mine"
    assert run_version("s3://bucket/runs/version_12/") == 12
