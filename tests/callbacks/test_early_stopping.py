"""`EarlyStopping`: when it checks, when it stops, and what it says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import paceline as pl
from paceline.callbacks import EarlyStopping, ModelCheckpoint
from paceline.callbacks.early_stopping import EarlyStoppingReason
from paceline.errors import ConfigurationError

from helpers.callback_runs import BATCHES, Scripted, loader, trainer
from helpers.ranks import run_ranks


def epochs_run(tmp_path: Path, scores: list[float], callback: EarlyStopping, **options: Any) -> int:
    run = trainer(tmp_path, callback, **({"max_epochs": 20} | options))
    run.fit(Scripted(scores), loader(), loader(2))
    return run.current_epoch


@pytest.mark.parametrize(
    ("scores", "arguments", "epochs"),
    [
        ([5, 4, 4, 4, 4], {"patience": 3}, 5),
        ([5, 4, 4, 3, 3, 3], {"patience": 2}, 6),
        ([1, 2, 2, 2], {"patience": 2, "mode": "max"}, 4),
        ([5, 4.9, 4.8, 4.7], {"patience": 2, "min_delta": 0.5}, 3),
        ([5, 4, 0.5, 0.4], {"stopping_threshold": 1.0}, 3),
        ([5, 4, 11, 0.4], {"divergence_threshold": 10.0}, 3),
        ([5, 4, math.nan, 3], {}, 3),
        ([5, math.inf, 3], {}, 2),
        ([5, 4, math.nan, 3, 3, 3, 3], {"check_finite": False}, 7),
        ([1, 2, 3], {"patience": 1}, 2),
    ],
)
def test_it_stops_when_it_should(tmp_path: Path, scores: list[float], arguments: dict[str, Any], epochs: int) -> None:
    callback = EarlyStopping("val_score", **arguments)
    assert epochs_run(tmp_path, scores, callback) == epochs
    assert callback.stopped_epoch == epochs - 1


def test_a_second_fit_of_one_trainer_is_watched_anew(tmp_path: Path) -> None:
    callback = EarlyStopping("val_score", patience=2)
    run = trainer(tmp_path, callback, max_epochs=20)
    for scores in ([1, 2, 2, 2], [5, 4, 4, 4]):
        run.fit(Scripted(scores), loader(), loader(2))
        assert run.current_epoch == len(scores) - (scores[0] == 1)


def test_it_tells_where_it_stands(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = EarlyStopping("val_score", patience=2, verbose=True)
    with caplog.at_level("INFO", "paceline"):
        epochs_run(tmp_path, [5, 4, 4, 4], callback)
    assert callback.wait_count == 2
    assert callback.best_score == torch.tensor(4.0)
    assert callback.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
    assert "Metric val_score improved. New best score: 5.000" in caplog.text
    assert "Metric val_score improved by 1.000 >= min_delta = 0.0. New best score: 4.000" in caplog.text
    message = "Monitored metric val_score did not improve in the last 2 records. Best score: 4.000."
    assert message in caplog.text
    assert message in (callback.stopping_reason_message or "")


@pytest.mark.parametrize(
    ("scores", "arguments", "reason", "message"),
    [
        ([math.nan], {}, "NON_FINITE_METRIC", "val_score = nan is not finite. Previous best value was inf"),
        ([1], {"stopping_threshold": 2.0}, "STOPPING_THRESHOLD", "Stopping threshold reached: val_score = 1.0 < 2.0"),
        ([9], {"divergence_threshold": 8.0}, "DIVERGENCE_THRESHOLD", "threshold reached: val_score = 9.0 > 8.0"),
    ],
)
def test_each_reason_has_its_message(
    tmp_path: Path, scores: list[float], arguments: dict[str, Any], reason: str, message: str
) -> None:
    callback = EarlyStopping("val_score", **arguments)
    epochs_run(tmp_path, scores, callback)
    assert callback.stopping_reason is EarlyStoppingReason[reason]
    assert message in (callback.stopping_reason_message or "")


def test_it_checks_after_each_validation_inside_an_epoch(tmp_path: Path) -> None:
    callback = EarlyStopping("val_score", patience=2)
    run = trainer(tmp_path, callback, max_epochs=20, val_check_interval=0.25)
    run.fit(Scripted([5, 6, 7, 8]), loader(), loader(2))
    assert run.global_step == 3 * BATCHES // 4


def test_it_checks_epochs_of_training_when_asked_to(tmp_path: Path) -> None:
    callback = EarlyStopping("val_score", patience=1, check_on_train_epoch_end=True)
    run = trainer(tmp_path, callback, max_epochs=20, val_check_interval=0.5)
    run.fit(Scripted([5, 6, 7, 8]), loader(), loader(2))
    assert run.global_step == 2 * BATCHES


def test_it_watches_metrics_of_training_without_validation(tmp_path: Path) -> None:
    class Rising(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("rising", float(self.current_epoch), on_epoch=True, on_step=False)
            return super().training_step(batch, batch_idx)

    run = trainer(tmp_path, EarlyStopping("rising", patience=2), max_epochs=20)
    run.fit(Rising(), loader())
    assert run.current_epoch == 3


def test_min_epochs_go_first(tmp_path: Path) -> None:
    assert epochs_run(tmp_path, [1, 2, 3], EarlyStopping("val_score", patience=1), min_epochs=6) == 6


def test_a_metric_that_was_never_logged_is_an_error_that_lists_those_that_were(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"EarlyStopping\(monitor='val_los'\).*not available.*'val_score'"):
        epochs_run(tmp_path, [1], EarlyStopping("val_los"))


def test_without_strict_a_missing_metric_is_passed_over(tmp_path: Path) -> None:
    assert epochs_run(tmp_path, [1], EarlyStopping("val_los", strict=False), max_epochs=2) == 2
    with pytest.warns(UserWarning, match="val_los"):
        epochs_run(tmp_path, [1], EarlyStopping("val_los", strict=False, verbose=True), max_epochs=1)


def test_validation_every_other_epoch_is_waited_for(tmp_path: Path) -> None:
    callback = EarlyStopping("val_score", patience=1, check_on_train_epoch_end=True)
    assert epochs_run(tmp_path, [1, 0, 3], callback, check_val_every_n_epoch=2) == 3


def test_a_fast_dev_run_checks_nothing(tmp_path: Path) -> None:
    epochs_run(tmp_path, [1], EarlyStopping("no such metric"), fast_dev_run=True)


def test_a_bad_mode_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="`mode` can be 'min' or 'max', but got 'auto'"):
        EarlyStopping("a", mode="auto")


def test_patience_goes_on_counting_in_a_resumed_run(tmp_path: Path) -> None:
    first, saves = EarlyStopping("val_score", patience=3), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer(tmp_path, first, saves, max_epochs=3).fit(Scripted([5, 6, 7]), loader(), loader(2))
    assert first.wait_count == 2
    second = EarlyStopping("val_score", patience=3)
    run = trainer(tmp_path, second, max_epochs=20)
    run.fit(Scripted([8]), loader(), loader(2), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert run.current_epoch == 4
    assert second.best_score == 5


def stop_with_uneven_scores(folder: str) -> tuple[int, int, float]:
    class Uneven(Scripted):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            better = self.trainer.global_rank == 0  # by its own values only one rank would stop
            self.log("val_score", float(self.validations * (-1 if better else 3)))

    callback = EarlyStopping("val_score", patience=2)
    run = trainer(folder, callback, strategy="ddp", devices=2, max_epochs=20)
    run.fit(Uneven(), loader(), loader(4))
    return run.current_epoch, callback.wait_count, callback.best_score.item()


def test_all_ranks_stop_together_by_the_global_metric(tmp_path: Path) -> None:
    results = run_ranks(stop_with_uneven_scores, 2, str(tmp_path))
    assert results[0] == results[1] == (3, 2, 0.0)


def test_the_trainer_knows_it(tmp_path: Path) -> None:
    callback = EarlyStopping("val_score")
    assert isinstance(callback, pl.Callback)
    assert trainer(tmp_path, callback).early_stopping_callback is callback
