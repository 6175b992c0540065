"""`Timer`: times, and an end of training when the time is over."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

import pytest

from paceline.callbacks import ModelCheckpoint, Timer
from paceline.errors import ConfigurationError

from helpers.ranks import run_ranks
from helpers.tiny import Regression, loader, tiny_trainer


class Slow(Regression):
    """A step takes some milliseconds."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.005)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(0.005)

    test_step = validation_step


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        ("00:00:00:22", 22),
        ("01:01:02:03", 90123),
        (timedelta(minutes=2), 120),
        ({"hours": 1, "seconds": 1}, 3601),
        (timedelta(0), 0),
    ],
)
def test_spellings_of_a_duration(duration: Any, seconds: float) -> None:
    remaining = Timer(duration).time_remaining()
    assert remaining == pytest.approx(seconds, abs=0.1)


def test_misuse_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'step' or 'epoch'"):
        Timer("00:00:00:01", interval="batch")
    with pytest.raises(ConfigurationError, match="DD:HH:MM:SS"):
        Timer("1 hour")
    with pytest.raises(ValueError, match="not a valid RunningStage"):
        Timer().time_elapsed("training")


def test_times_of_the_stages() -> None:
    timer = Timer()
    assert timer.time_remaining() is None
    assert timer.start_time() is None
    assert timer.time_elapsed() == 0
    trainer = tiny_trainer(callbacks=[timer], max_epochs=2, num_sanity_val_steps=0)
    began = time.monotonic()
    trainer.fit(Slow(), loader(8), loader(4))
    trainer.test(Slow(), loader(6))
    took = time.monotonic() - began
    start, end = timer.start_time("train"), timer.end_time("train")
    assert start is not None
    assert end is not None
    assert 8 * 0.005 < timer.time_elapsed() == end - start < took
    assert 2 * 0.005 < timer.time_elapsed("validate") < took
    assert 3 * 0.005 < timer.time_elapsed("test") < took
    assert trainer.global_step == 8


def test_a_step_timer_stops_within_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paceline")
    timer = Timer(timedelta(milliseconds=100))
    trainer = tiny_trainer(callbacks=[timer], max_epochs=1)
    trainer.fit(Slow(), loader(128))
    assert 0 < trainer.global_step < 64
    assert trainer.should_stop
    assert timer.time_remaining() <= 0  # type: ignore[operator]
    assert [record.message for record in caplog.records].count(
        "Time limit reached. Elapsed time is 0:00:00. Signaling Trainer to stop."
    ) == 1


def test_an_epoch_timer_finishes_the_epoch() -> None:
    trainer = tiny_trainer(callbacks=[Timer(timedelta(milliseconds=60), "epoch", verbose=False)], max_epochs=1000)
    trainer.fit(Slow(), loader(16))
    assert trainer.global_step % 8 == 0
    assert 1 <= trainer.current_epoch < 10


def test_min_steps_go_on_beyond_the_time() -> None:
    trainer = tiny_trainer(callbacks=[Timer(timedelta(0))], max_epochs=100, min_steps=7)
    trainer.fit(Regression(), loader(4))
    assert trainer.global_step == 7


def test_without_time_not_a_step_is_taken() -> None:
    trainer = tiny_trainer(callbacks=[Timer(timedelta(0))], max_epochs=100)
    trainer.fit(Regression(), loader(4))
    assert trainer.global_step == 0


def test_a_resumed_run_has_the_time_that_was_left() -> None:
    timer = Timer(timedelta(milliseconds=80))
    saving = ModelCheckpoint(dirpath="saved", save_top_k=-1, every_n_train_steps=1)
    first = tiny_trainer(callbacks=[timer, saving], max_epochs=100, enable_checkpointing=True)
    first.fit(Slow(), loader(16))
    assert 0 < first.global_step < 800
    timer = Timer(timedelta(milliseconds=80))
    saved = saving.best_model_path
    second = tiny_trainer(callbacks=[timer], max_epochs=100)
    second.fit(Slow(), loader(16), ckpt_path=saved)
    assert timer._offset > 0
    assert first.global_step - 1 <= second.global_step <= first.global_step + 1
    other = Timer()
    other.load_state_dict(timer.state_dict())
    assert other.time_elapsed() == pytest.approx(timer.time_elapsed())


def stops_on_one_rank() -> int:
    trainer = tiny_trainer(strategy="ddp", devices=2, max_steps=100_000)
    duration = timedelta(milliseconds=100) if trainer.global_rank else timedelta(hours=1)
    trainer.callbacks.append(Timer(duration, verbose=False))
    trainer.fit(Slow(), loader(128))
    return trainer.global_step


def test_the_first_rank_whose_time_is_over_stops_all_at_one_step() -> None:
    steps = run_ranks(stops_on_one_rank, 2)
    assert steps[0] == steps[1] < 10_000
