"""`ThroughputMonitor`: rates by the host's clock."""

from __future__ import annotations

import time
from typing import Any

import pytest

from paceline.callbacks import LambdaCallback, ThroughputMonitor
from paceline.callbacks.throughput import Work
from paceline.errors import ConfigurationError

from helpers.ranks import run_ranks
from helpers.tiny import Regression, loader, tiny_trainer

SECONDS = 0.01


class Slow(Regression):
    """An update takes `SECONDS`, a validation much longer."""

    flops_per_batch = 1000

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(SECONDS)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(10 * SECONDS)

    test_step = validation_step


def points(monitor: ThroughputMonitor, **arguments: Any) -> dict[int, dict[str, float]]:
    """What was logged of a run, by step."""
    logged: dict[int, dict[str, float]] = {}

    def note(trainer: Any, module: Any, metrics: Any, step: int) -> None:
        logged.setdefault(step, {}).update(metrics)

    trainer = tiny_trainer(callbacks=[monitor, LambdaCallback(on_log=note)], **{"log_every_n_steps": 4, **arguments})
    trainer.fit(Slow(), loader(16), loader(2))
    return logged


def test_rates_of_work() -> None:
    work = Work(4.0, 2, 8, 80, 1e6).since(Work(2.0, 1, 2, 40, 0.0))
    assert work == Work(2.0, 1, 6, 40, 1e6)
    assert work.rates() == {"batches_per_sec": 0.5, "samples_per_sec": 3, "items_per_sec": 20, "flops_per_sec": 5e5}
    assert Work(0.0, 1, 1).rates() == {}
    assert set(Work(1.0, 1, 1).rates()) == {"batches_per_sec", "samples_per_sec"}


def test_rates_of_training_leave_validation_out() -> None:
    logged = points(
        ThroughputMonitor(length_fn=lambda batch: batch[0].numel(), available_flops=1e6), val_check_interval=2
    )
    assert sorted(step for step, metrics in logged.items() if "train/time" in metrics) == [1, 4, 8]
    last = logged[8]
    assert last["train/batches"] == 8
    assert last["train/samples"] == 16
    assert last["train/lengths"] == 48
    assert 8 * SECONDS <= last["train/time"] < 20 * SECONDS
    assert last["train/device/batches_per_sec"] == pytest.approx(8 / last["train/time"], rel=1e-5)
    assert last["train/device/samples_per_sec"] == pytest.approx(16 / last["train/time"], rel=1e-5)
    assert last["train/device/items_per_sec"] == pytest.approx(48 / last["train/time"], rel=1e-5)
    assert last["train/device/flops_per_sec"] == pytest.approx(8000 / last["train/time"], rel=1e-5)
    assert last["train/device/mfu"] == pytest.approx(8000 / last["train/time"] / 1e6, rel=1e-5)
    assert "train/samples_per_sec" not in last
    assert 0 < last["validate/device/samples_per_sec"] < 2 / (10 * SECONDS)


def test_the_window_forgets_what_was_long_ago() -> None:
    class Speeding(Slow):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(0.0 if batch_idx > 4 else 0.1)
            return Regression.training_step(self, batch, batch_idx)

    logged: dict[int, Any] = {}
    note = LambdaCallback(on_log=lambda t, m, metrics, step: logged.setdefault(step, dict(metrics)))
    trainer = tiny_trainer(callbacks=[ThroughputMonitor(window_size=2), note], log_every_n_steps=1)
    trainer.fit(Speeding(), loader(16))
    assert logged[8]["train/device/batches_per_sec"] > 10 > logged[5]["train/device/batches_per_sec"]


def test_accumulated_batches_are_counted_one_by_one() -> None:
    logged = points(ThroughputMonitor(lambda batch: 5, separator="."), accumulate_grad_batches=2)
    assert sorted(step for step, metrics in logged.items() if "train.time" in metrics) == [1, 4]
    assert (logged[4]["train.batches"], logged[4]["train.samples"]) == (8, 40)


def test_a_test_logs_its_rates() -> None:
    (results,) = tiny_trainer(callbacks=[ThroughputMonitor()]).test(Slow(), loader(4), verbose=False)
    assert results["test/samples"] == 4
    assert 0 < results["test/device/samples_per_sec"] < 4 / (20 * SECONDS)


def test_a_window_has_room_for_an_update() -> None:
    with pytest.raises(ConfigurationError, match="window_size=0"):
        ThroughputMonitor(window_size=0)


def measures_on_a_rank() -> Any:
    return points(ThroughputMonitor(), strategy="ddp", devices=2)


def test_ranks_are_added_up() -> None:
    first, second = run_ranks(measures_on_a_rank, 2)
    assert first == second
    last = first[4]
    assert last["train/samples"] == 16
    assert last["train/samples_per_sec"] == pytest.approx(2 * last["train/device/samples_per_sec"])
    assert last["validate/samples"] == 2
