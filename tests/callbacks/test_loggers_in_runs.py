"""What loggers hold after runs: whole, killed and resumed, failed, on one rank and on several."""

from __future__ import annotations

import csv
import json
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import paceline as pl
from paceline.callbacks import Callback, CSVLogger, JSONLLogger, Logger, ModelCheckpoint, TensorBoardLogger, WandbLogger
from paceline.callbacks.log_file import read_text
from paceline.errors import ConfigurationError
from paceline.trainer.rank_zero import rank_zero_only

from helpers.callback_runs import BATCHES, Scripted, loader, trainer
from helpers.ranks import RanksFailed, run_ranks


class Kept(Logger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.points: list[tuple[int | None, dict[str, Any]]] = []
        self.hparams: list[Any] = []
        self.ends: list[str] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.points.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.hparams.append(dict(params))

    def finalize(self, status: str) -> None:
        self.ends.append(status)

    def steps_of(self, name: str) -> list[int | None]:
        return [step for step, metrics in self.points if name in metrics]


def test_points_carry_step_epoch_and_samples(tmp_path: Path) -> None:
    kept = Kept()
    trainer(tmp_path, logger=kept, log_every_n_steps=3).fit(Scripted(), loader(), loader(2))
    assert kept.steps_of("train_loss") == [1, 3, 6, 8, 9, 12, 15, 16]
    assert kept.steps_of("val_score") == [8, 16]
    for step, metrics in kept.points:
        assert step is not None
        assert metrics["samples"] == 2 * step
        assert metrics["epoch"] == (step - 1) // BATCHES


def test_hyper_parameters_are_logged_once_a_run(tmp_path: Path) -> None:
    kept = Kept()
    run = trainer(tmp_path, logger=kept)
    model = Scripted(lr=0.25)
    run.fit(model, loader(), loader(2))
    assert kept.hparams == [{"lr": 0.25}]
    run.test(model, loader(2))
    assert kept.hparams == [{"lr": 0.25}, {"lr": 0.25}]


def test_the_data_modules_hyper_parameters_join_the_modules(tmp_path: Path) -> None:
    class Data(pl.DataModule):
        def __init__(self, batches: int) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return loader(self.hparams.batches)

    kept = Kept()
    trainer(tmp_path, logger=kept).fit(Scripted(), datamodule=Data(3))
    assert kept.hparams == [{"lr": 0.1, "batches": 3}]

    class Clash(Data):
        def __init__(self, lr: float) -> None:
            super().__init__(2)
            self.save_hyperparameters()

    with pytest.raises(ConfigurationError, match=r"\['lr'\], with different values"):
        trainer(tmp_path, logger=kept).fit(Scripted(), datamodule=Clash(5.0))


def test_a_run_ends_as_success_or_as_failed(tmp_path: Path) -> None:
    class Failing(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 2:
                raise KeyError("bad")
            return super().training_step(batch, batch_idx)

    kept = Kept()
    run = trainer(tmp_path, logger=kept)
    run.fit(Scripted(), loader())
    run.validate(Scripted(), loader(2))
    with pytest.raises(KeyError):
        run.fit(Failing(), loader())
    assert kept.ends == ["success", "success", "failed"]


def test_the_module_reaches_the_logger(tmp_path: Path) -> None:
    class Writing(Scripted):
        def on_train_start(self) -> None:
            self.logger.log_metrics({"mine": 1.0}, step=0)
            self.logger.experiment.flush()

    run = trainer(tmp_path, logger=CSVLogger(tmp_path, version="a"), max_epochs=1)
    run.fit(Writing(), loader())
    assert run.logger is run.loggers[0]
    assert "mine" in rows(run.logger.metrics_file_path)[0]


def test_a_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    kept = Kept()
    trainer(tmp_path / "runs", kept, JSONLLogger(tmp_path / "own"), fast_dev_run=True).fit(Scripted(), loader())
    assert kept.points == kept.hparams == []
    assert list(tmp_path.rglob("*.json*")) == []


# --- files -------------------------------------------------------------------------------------------------------
def points(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (read_text(str(path)) or "").splitlines()]


def rows(path: Path | str) -> list[dict[str, str]]:
    return list(csv.DictReader((read_text(str(path)) or "").splitlines()))


def test_the_default_logger_writes_into_the_runs_folder(tmp_path: Path) -> None:
    run = trainer(tmp_path, logger=True, log_every_n_steps=4)
    run.fit(Scripted(), loader(), loader(2))
    assert isinstance(run.logger, JSONLLogger)
    assert run.logger.log_dir == run.log_dir == str(tmp_path / "version_0")
    assert run.logger.version == 0
    written = points(tmp_path / "version_0" / "metrics.jsonl")
    assert [p["step"] for p in written if "train_loss" in p] == [1, 4, 8, 12, 16]
    assert [p["val_score"] for p in written if "val_score" in p] == [0, 1]
    assert json.loads((tmp_path / "version_0" / "hparams.json").read_text()) == {"lr": 0.1}


def test_it_writes_into_a_store() -> None:
    root = f"memory://{uuid.uuid4()}"
    run = trainer(root, logger=[JSONLLogger(), CSVLogger()], log_every_n_steps=4)
    run.fit(Scripted(), loader(), loader(2))
    assert [p["step"] for p in points(f"{run.log_dir}/metrics.jsonl") if "train_loss" in p] == [1, 4, 8, 12, 16]
    assert len(rows(f"{run.log_dir}/metrics.csv")) == len(points(f"{run.log_dir}/metrics.jsonl"))


def test_csv_without_a_folder_of_its_own_joins_the_runs(tmp_path: Path) -> None:
    run = trainer(tmp_path, logger=CSVLogger())
    run.fit(Scripted(), loader())
    assert run.logger.log_dir == run.log_dir
    assert (tmp_path / "version_0" / "metrics.csv").exists()


def test_tensorboard_has_the_curves_and_the_hyper_parameters(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="tb")
    trainer(tmp_path, logger=logger, log_every_n_steps=4).fit(Scripted(), loader(), loader(2))
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert [e.step for e in events.Scalars("train_loss")] == [1, 4, 8, 12, 16]
    assert [(e.step, e.value) for e in events.Scalars("val_score")] == [(8, 0), (16, 1)]
    assert (tmp_path / "tb" / "version_0" / "hparams.yaml").exists()


def test_tensorboard_drops_what_came_after_the_save_of_a_resumed_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Shifted(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("shifted", float(self.global_step + 1 + 100 * self.shift))
            return super().training_step(batch, batch_idx)

    for shift, ckpt_path in enumerate((None, tmp_path / "step=5.ckpt")):
        saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
        logger = TensorBoardLogger(tmp_path, version="a")
        model = Shifted()
        model.shift = shift
        run = trainer(tmp_path, saves, logger=logger, log_every_n_steps=1, max_epochs=1)
        run.fit(model, loader(), ckpt_path=ckpt_path)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert [e.value for e in events.Scalars("shifted")] == [1, 2, 3, 4, 5, 106, 107, 108]


class Dies(Callback):
    """Ends the process by SIGKILL after update `step`, as a machine that is taken away does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def file_loggers(folder: Path) -> list[Logger]:
    return [JSONLLogger(folder), CSVLogger(folder, version="v", flush_logs_every_n_steps=1)]


def logged_run(
    folder: str, *callbacks: Callback, every: int, ckpt_path: Path | None = None, validations: int = 0
) -> None:
    """Validates every 4 updates, saves all `every` updates; `validations` happened before `ckpt_path` was saved."""
    model = Scripted()
    model.validations = validations
    saves = ModelCheckpoint(f"{folder}/ckpts", "{step}", every_n_train_steps=every, save_top_k=-1, async_save=False)
    options: dict[str, Any] = {"log_every_n_steps": 1, "val_check_interval": 4}
    run = trainer(folder, saves, *callbacks, logger=file_loggers(Path(folder)), **options)
    run.fit(model, loader(), loader(2), ckpt_path=ckpt_path)


def logged_run_that_dies(folder: str, step: int, every: int) -> None:
    logged_run(folder, Dies(step), every=every)


def comparable(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: p.get(name) for name in ("step", "epoch", "samples", "val_score")} for p in found]


@pytest.mark.parametrize(
    ("killed_at", "every"),
    [(8, 5), (16, 7), (15, 12)],
)
def test_a_killed_and_resumed_run_has_no_point_twice_and_none_lost(tmp_path: Path, killed_at: int, every: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    logged_run(str(whole), every=every)
    with pytest.raises(RanksFailed):
        run_ranks(logged_run_that_dies, 1, str(killed), killed_at, every)
    step = max(int(path.stem.split("=")[1]) for path in (killed / "ckpts").glob("*.ckpt"))
    assert len(points(killed / "metrics.jsonl")) > len(
        [p for p in points(whole / "metrics.jsonl") if p["step"] <= step]
    )
    logged_run(str(killed), every=every, ckpt_path=killed / "ckpts" / f"step={step}.ckpt", validations=(step - 1) // 4)

    assert comparable(points(killed / "metrics.jsonl")) == comparable(points(whole / "metrics.jsonl"))
    path = Path("lightning_logs", "v", "metrics.csv")
    assert comparable(rows(killed / path)) == comparable(rows(whole / path))


# --- wandb -------------------------------------------------------------------------------------------------------
@pytest.fixture
def quiet_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-own"))
    yield wandb
    wandb.finish()


def test_wandb_has_the_whole_run(tmp_path: Path, quiet_wandb: Any) -> None:
    from helpers.wandb_files import read_offline_runs

    logger = WandbLogger(name="a run", project="digits", save_dir=tmp_path, offline=True)
    trainer(tmp_path, logger=logger, log_every_n_steps=4).fit(Scripted(), loader(), loader(2))
    quiet_wandb.finish()
    (run,) = read_offline_runs(tmp_path)
    assert (run.project, run.name, run.config["lr"]) == ("digits", "a run", 0.1)
    assert [p["trainer/global_step"] for p in run.history if "train_loss" in p] == [1, 4, 8, 12, 16]
    assert [(p["trainer/global_step"], p["val_score"]) for p in run.history if "val_score" in p] == [(8, 0), (16, 1)]
    assert run.summary["val_score"] == 1
    assert json.loads((tmp_path / "version_0" / "wandb.json").read_text())["id"] == run.run_id


# --- several ranks -------------------------------------------------------------------------------------------------
class Counted(Logger):
    """One that users wrote for Lightning: `rank_zero_only` and nothing else."""

    def __init__(self) -> None:
        self.steps: list[int | None] = []

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.steps.append(step)

    @property
    def name(self) -> str:
        return "counted"


def log_on_two_ranks(folder: str) -> tuple[list[int | None], list[str], str]:
    os.environ["WANDB_SILENT"] = "true"
    counted = Counted()
    loggers = [
        counted,
        JSONLLogger(),
        CSVLogger(folder, name="csv"),
        TensorBoardLogger(folder, name="tb"),
        WandbLogger(save_dir=folder, offline=True),
    ]

    class Direct(Scripted):
        def on_train_end(self) -> None:
            for logger in self.trainer.loggers:
                logger.log_metrics({"by_hand": 1.0}, step=self.global_step)
            self.trainer.loggers[4].experiment.config.update({"by_hand": 2})

    run = trainer(folder, logger=loggers, strategy="ddp", devices=2, log_every_n_steps=2)
    run.fit(Direct(), loader(), loader(3))
    if run.is_global_zero:
        import wandb

        wandb.finish()
    return counted.steps, [str(logger.version) for logger in loggers[1:4]], str(run.log_dir)


def test_one_run_for_many_ranks(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    from helpers.wandb_files import read_offline_runs

    (steps, versions, log_dir), (steps_of_other, versions_of_other, log_dir_of_other) = run_ranks(
        log_on_two_ranks, 2, str(tmp_path)
    )
    assert steps_of_other == []
    assert versions == versions_of_other == ["0", "0", "0"]
    assert log_dir == log_dir_of_other
    assert len(list((tmp_path / "tb" / "version_0").glob("events*"))) == 1
    found = points(Path(log_dir, "metrics.jsonl"))
    assert [p["step"] for p in found] == steps
    assert len([p for p in found if "by_hand" in p]) == 1
    assert len(rows(tmp_path / "csv" / "version_0" / "metrics.csv")) == len(found)
    (run,) = read_offline_runs(tmp_path)
    assert len(run.history) == len(found)
    assert run.config["by_hand"] == 2
