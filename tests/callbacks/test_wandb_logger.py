"""`WandbLogger` with the real wandb, offline; what it wrote is read back from wandb's own file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import paceline as pl
from paceline.callbacks import Callback, ModelCheckpoint, WandbLogger
from paceline.errors import ConfigurationError

from helpers.callback_runs import BATCHES, Scripted, loader, trainer
from helpers.wandb_files import OfflineRun, read_offline_runs

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def quiet_and_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    yield
    wandb.finish()


def written(folder: Path) -> OfflineRun:
    wandb.finish()
    (run,) = read_offline_runs(folder)
    return run


def test_names_steps_config_and_summary_are_in_the_written_run(tmp_path: Path) -> None:
    logger = WandbLogger(name="first try", project="digits", save_dir=tmp_path, offline=True, tags=["a"])
    logger.log_hyperparams({"lr": 0.1, "net": {"width": 4}, "device": torch.device("cpu")})
    logger.log_metrics({"loss": 0.5, "epoch": 0, "samples": 32}, step=50)
    logger.log_metrics({"loss": torch.tensor(0.25), "epoch": 1, "samples": 64}, step=100)
    logger.log_metrics({"val_loss": 2.0}, step=100)
    logger.finalize("success")
    run = written(tmp_path)
    assert (run.project, run.name, run.run_id) == ("digits", "first try", logger.version)
    assert run.config["lr"] == 0.1
    assert run.config["net"] == {"width": 4}
    assert run.config["device"] == "cpu"
    assert run.history == [
        {"loss": 0.5, "epoch": 0, "samples": 32, "trainer/global_step": 50},
        {"loss": 0.25, "epoch": 1, "samples": 64, "trainer/global_step": 100},
        {"val_loss": 2.0, "trainer/global_step": 100},
    ]
    assert run.summary["loss"] == 0.25
    assert run.summary["val_loss"] == 2.0
    assert run.exit_code == 0


def test_the_global_step_is_the_x_axis(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    logger.log_metrics({"loss": 1.0}, step=1)
    run = written(tmp_path)
    assert ("trainer/global_step", "") in run.metrics
    assert ("*", "trainer/global_step") in run.metrics
    assert run.project == "lightning_logs"


def test_users_own_calls_of_log_do_not_push_points_out(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    for step in range(1, 6):
        logger.experiment.log({"mine": step})
        logger.experiment.log({"mine too": step})
        logger.log_metrics({"loss": float(step)}, step=step)
    run = written(tmp_path)
    assert [p["loss"] for p in run.history if "loss" in p] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert len(run.history) == 15


def test_the_prefix_is_put_before_each_name(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True, prefix="p")
    logger.log_metrics({"loss": 1.0}, step=1)
    assert written(tmp_path).history == [{"p-loss": 1.0, "trainer/global_step": 1}]


def test_id_and_version_name_the_run(tmp_path: Path) -> None:
    assert WandbLogger(id="abc").version == "abc"
    logger = WandbLogger(version="def", save_dir=tmp_path, offline=True)
    assert logger.experiment.id == "def"
    assert logger.name == "lightning_logs"
    assert logger.save_dir == str(tmp_path)


def test_a_run_that_is_there_already_is_used(tmp_path: Path) -> None:
    mine = wandb.init(mode="offline", dir=str(tmp_path), project="mine")
    assert WandbLogger(save_dir=tmp_path).experiment is mine
    assert WandbLogger(experiment=mine).version == mine.id


def test_other_ranks_have_no_run_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    logger.experiment.config.update({"a": 1})
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.log_hyperparams({"lr": 1})
    logger.watch(torch.nn.Linear(1, 1))
    logger.finalize("success")
    assert wandb.run is None
    assert read_offline_runs(tmp_path) == []


def test_watch_logs_histograms_of_the_gradients(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    logger.watch(model, log_freq=1, log_graph=False)
    model(torch.ones(1, 2)).sum().backward()
    logger.log_metrics({"loss": 1.0}, step=1)
    assert any("gradients/weight" in name for point in written(tmp_path).history for name in point)


class Fails(Callback):
    """Raises after update `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise KeyError("gone")


def logged_run(root: Path, *callbacks: Callback, folder: Path | None = None, **options: Any) -> pl.Trainer:
    """A trainer that logs each update; `folder` makes it go on in the folder of another run."""
    logger = WandbLogger(save_dir=root, offline=True)
    run = trainer(root, *callbacks, logger=logger, log_every_n_steps=1, val_check_interval=2, **options)
    run.run_folder = None if folder is None else str(folder)
    return run


def test_a_failed_and_resumed_run_has_no_point_twice_and_none_lost(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path / "ckpts", "{step}", every_n_train_steps=3, save_top_k=-1)
    first = logged_run(tmp_path, saves, Fails(6), max_epochs=1)
    with pytest.raises(KeyError):
        first.fit(Scripted(), loader(), loader(2))
    wandb.finish()

    second = logged_run(tmp_path, folder=tmp_path / "version_0", max_epochs=1)
    model = Scripted()
    model.validations = 1
    second.fit(model, loader(), loader(2), ckpt_path=tmp_path / "ckpts" / "step=3.ckpt")
    wandb.finish()

    before, after = read_offline_runs(tmp_path)
    assert before.run_id == after.run_id == second.logger.version
    history = before.history + after.history
    assert [p["trainer/global_step"] for p in history if "train_loss" in p] == [*range(1, BATCHES + 1)]
    assert [p["trainer/global_step"] for p in history if "val_score" in p] == [2, 4, 6, 8]
    assert [p["val_score"] for p in history if "val_score" in p] == [0, 1, 2, 3]


def test_a_test_in_the_same_folder_joins_the_run(tmp_path: Path) -> None:
    logged_run(tmp_path, max_epochs=1).fit(Scripted(), loader())
    wandb.finish()
    logged_run(tmp_path, folder=tmp_path / "version_0").test(Scripted(), loader(2))
    wandb.finish()
    trained, tested = read_offline_runs(tmp_path)
    assert trained.run_id == tested.run_id
    assert [p["test_score"] for p in tested.history] == [7.0]


def test_a_run_in_another_folder_is_another_run(tmp_path: Path) -> None:
    for _ in range(2):
        logged_run(tmp_path, max_epochs=1).fit(Scripted(), loader())
        wandb.finish()
    first, second = read_offline_runs(tmp_path)
    assert first.run_id != second.run_id


def uploads(tmp_path: Path, scores: list[float], **options: Any) -> list[tuple[str, str, list[str]]]:
    """What is uploaded of checkpoints with these scores, of which the best is kept."""
    logger = WandbLogger(save_dir=tmp_path, mode="offline", id="abc", **options)
    saves = ModelCheckpoint(monitor="val_score")
    trainer(tmp_path, saves, logger=logger, max_epochs=len(scores)).fit(Scripted(scores), loader(), loader(2))
    return written(tmp_path).artifacts


def test_log_model_uploads_the_best_checkpoint_at_the_end(tmp_path: Path) -> None:
    assert uploads(tmp_path, [3, 2, 4], log_model=True) == [("model-abc", "model", ["best", "latest"])]


def test_log_model_all_uploads_each_checkpoint_when_it_is_saved(tmp_path: Path) -> None:
    found = uploads(tmp_path, [3, 2, 4], log_model="all", checkpoint_name="mine")
    assert found == [("mine", "model", ["best", "latest"])] * 2


def test_uploads_of_an_offline_run_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="cannot upload"):
        WandbLogger(offline=True, log_model=True)


def test_tables_texts_and_images(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    logger.log_table("table", columns=["a"], data=[[1]], step=5)
    logger.log_text("text", columns=["a"], data=[["x"]])
    logger.log_image("image", [torch.zeros(4, 4).numpy()], step=6, caption=["black"])
    history = written(tmp_path).history
    kinds = {name: value for point in history for name, value in point.items() if name.endswith("_type")}
    assert kinds == {"table/_type": "table-file", "text/_type": "table-file", "image/_type": "images/separated"}
    assert history[0]["trainer/global_step"] == 5
    with pytest.raises(ConfigurationError, match="1 items, but 2 of caption"):
        logger.log_image("image", [0], caption=["a", "b"])
    with pytest.raises(ConfigurationError, match="expected a list"):
        logger.log_image("image", "no list")
