"""`ckpt_path="auto"` and `"last"`: the newest checkpoint that is whole, and what is passed over is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.callbacks import ModelCheckpoint
from paceline.errors import CheckpointError

from helpers.resumable import Outcome, run, saved_in


def trained(root: Path, ckpt_path: str | None, steps: int) -> Outcome:
    saves = ModelCheckpoint(every_n_train_steps=2)
    return run("sgd_momentum_by_step", root, ckpt_path, callbacks=(saves,), max_steps=steps)


def damage(root: Path, version: str) -> str:
    (path,) = saved_in(root, version)
    file = Path(path, "model.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    return path


@pytest.mark.parametrize("ckpt_path", ["auto", "last"])
def test_a_damaged_checkpoint_is_named_and_an_older_version_folder_goes_on(ckpt_path: str, tmp_path: Path) -> None:
    trained(tmp_path, None, 2)
    trained(tmp_path, None, 4)
    damaged = damage(tmp_path, "version_1")
    with pytest.warns(UserWarning, match=f"ckpt_path='{ckpt_path}' passes over {damaged}: .*was altered"):
        assert trained(tmp_path, ckpt_path, 5).seen[0][1] == 2  # the third batch


def test_where_all_is_damaged_that_is_told_and_auto_starts_afresh(tmp_path: Path) -> None:
    trained(tmp_path, None, 2)
    damaged = damage(tmp_path, "version_0")
    with pytest.warns(UserWarning, match=f"passes over {damaged}"), pytest.raises(CheckpointError, match="no valid"):
        trained(tmp_path, "last", 3)
    with pytest.warns(UserWarning, match=f"passes over {damaged}"):
        assert trained(tmp_path, "auto", 3).seen[0][1] == 0


def test_weights_alone_are_passed_over_and_the_run_goes_on_from_all_of_its_state(tmp_path: Path) -> None:
    def saves() -> tuple[ModelCheckpoint, ModelCheckpoint]:
        every_step = ModelCheckpoint(every_n_train_steps=1, filename="w{step}", save_weights_only=True)
        return ModelCheckpoint(every_n_train_steps=2), every_step

    whole = run("sgd_momentum_by_step", tmp_path / "whole", max_steps=5)
    run("sgd_momentum_by_step", tmp_path / "runs", callbacks=saves(), max_steps=3)
    with pytest.warns(UserWarning, match="wstep=3.ckpt: it holds weights only"):
        resumed = run("sgd_momentum_by_step", tmp_path / "runs", "auto", callbacks=saves(), max_steps=5)
    assert resumed.digests == whole.digests and len(resumed.seen) == 3


def test_best_is_what_the_newest_checkpoint_says_also_where_the_run_was_moved(tmp_path: Path) -> None:
    def saves() -> ModelCheckpoint:  # the oldest has the highest loss
        return ModelCheckpoint(monitor="val_loss", mode="max", save_top_k=1, save_last=True)

    best = saves()
    run("sgd_momentum_by_step", tmp_path / "runs", callbacks=(best,))
    assert best.best_model_path.endswith("epoch=0-step=9.ckpt") and len(saved_in(tmp_path / "runs")) == 2
    (tmp_path / "runs").rename(tmp_path / "moved")
    resumed = run("sgd_momentum_by_step", tmp_path / "moved", "best", callbacks=(saves(),))
    assert resumed.seen[0][:2] == (1, 0)
    with pytest.raises(CheckpointError, match="there is no valid checkpoint in"):
        run("sgd_momentum_by_step", tmp_path / "elsewhere", "best")
