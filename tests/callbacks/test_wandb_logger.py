"""`WandbLogger` with the real wandb, offline; what it wrote is read back from wandb's own file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paceline.callbacks.wandb_logger import WandbLogger
from paceline.errors import ConfigurationError

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


def fitting(folder: Path, stage: str = "fit") -> Any:
    """What `setup` reads of a trainer."""
    return SimpleNamespace(
        log_dir=str(folder), is_global_zero=True, fast_dev_run=False, state=SimpleNamespace(fn=stage)
    )


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


def test_a_run_killed_and_resumed_in_its_folder_has_no_point_twice_and_none_lost(tmp_path: Path) -> None:
    def log(logger: WandbLogger, steps: range) -> None:
        for step in steps:
            logger.log_metrics({"loss": float(step)}, step=step)
            if step % 2 == 0 and not (step == 4 and logger is killed):  # killed between two points of a step
                logger.log_metrics({"val_loss": float(step)}, step=step)

    options: dict[str, Any] = {"save_dir": tmp_path, "offline": True}
    killed = WandbLogger(**options)
    killed.setup(fitting(tmp_path / "version_0"), None, "fit")  # type: ignore[arg-type]
    log(killed, range(1, 5))
    wandb.finish()

    resumed = WandbLogger(**options)
    resumed.setup(fitting(tmp_path / "version_0"), None, "fit")  # type: ignore[arg-type]
    log(resumed, range(3, 7))  # the checkpoint was of step 2
    wandb.finish()

    first, second = read_offline_runs(tmp_path)
    assert first.run_id == second.run_id == resumed.version
    history = first.history + second.history
    assert [p["loss"] for p in history if "loss" in p] == [1, 2, 3, 4, 5, 6]
    assert [p["val_loss"] for p in history if "val_loss" in p] == [2, 4, 6]


def test_a_test_of_its_own_joins_the_run_of_its_folder(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_dir": tmp_path, "offline": True}
    trained = WandbLogger(**options)
    trained.setup(fitting(tmp_path / "version_0"), None, "fit")  # type: ignore[arg-type]
    trained.log_metrics({"loss": 1.0}, step=10)
    wandb.finish()
    tested = WandbLogger(**options)
    tested.setup(fitting(tmp_path / "version_0", "test"), None, "test")  # type: ignore[arg-type]
    tested.log_metrics({"test_loss": 1.0}, step=0)
    wandb.finish()
    first, second = read_offline_runs(tmp_path)
    assert first.run_id == second.run_id
    assert [p["test_loss"] for p in second.history] == [1.0]


def test_a_run_in_another_folder_is_another_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_dir": tmp_path, "offline": True}
    for folder in ("version_0", "version_1"):
        logger = WandbLogger(**options)
        logger.setup(fitting(tmp_path / folder), None, "fit")  # type: ignore[arg-type]
        logger.log_metrics({"loss": 1.0}, step=1)
        wandb.finish()
    first, second = read_offline_runs(tmp_path)
    assert first.run_id != second.run_id


def checkpoints(folder: Path, **scores: float) -> Any:
    for name in scores:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "manifest.json").write_text("{}")
    paths = {str(folder / name): score for name, score in scores.items()}
    best = min(paths, key=lambda path: paths[path])
    return SimpleNamespace(saved_paths=lambda: paths, best_model_path=best, mode="min", save_top_k=1)


def test_log_model_uploads_checkpoints_at_the_end(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, log_model=True, id="abc", mode="offline")
    logger.after_save_checkpoint(checkpoints(tmp_path / "ckpts", a=2.0))
    logger.after_save_checkpoint(checkpoints(tmp_path / "ckpts", b=1.0))
    assert logger.experiment.id == "abc"
    logger.finalize("success")
    assert written(tmp_path).artifacts == [("model-abc", "model", ["best", "latest"])]


def test_log_model_all_uploads_each_checkpoint_once(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, log_model="all", checkpoint_name="mine", mode="offline")
    logger.after_save_checkpoint(checkpoints(tmp_path / "ckpts", a=2.0))
    logger.after_save_checkpoint(checkpoints(tmp_path / "ckpts", a=2.0, b=3.0))
    logger.finalize("failed")
    names = [(name, aliases) for name, _, aliases in written(tmp_path).artifacts]
    assert names == [("mine", ["best", "latest"]), ("mine", ["latest"])]


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
