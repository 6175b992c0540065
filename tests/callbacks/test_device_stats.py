"""`DeviceStatsMonitor`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.callbacks import CSVLogger, DeviceStatsMonitor, LambdaCallback
from paceline.callbacks.device_stats import device_stats
from paceline.errors import ConfigurationError

from helpers.ranks import run_ranks
from helpers.tiny import Regression, loader, tiny_trainer

CPU = ["cpu_percent", "cpu_swap_percent", "cpu_vm_percent"]


class Net(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    test_step = validation_step


def points(monitor: DeviceStatsMonitor, **arguments: Any) -> list[tuple[int, dict[str, float]]]:
    """What a run of 6 updates delivers."""
    logged: list[tuple[int, dict[str, float]]] = []
    note = LambdaCallback(on_log=lambda trainer, module, metrics, step: logged.append((step, dict(metrics))))
    trainer = tiny_trainer(callbacks=[monitor, note], logger=CSVLogger("logs"), log_every_n_steps=4, **arguments)
    trainer.fit(Net(), loader(12), loader(4))
    return logged


def test_the_cpu_is_logged_at_logged_steps_where_it_is_the_device() -> None:
    logged = points(DeviceStatsMonitor(), num_sanity_val_steps=1)
    of_training = {
        step: metrics for step, metrics in logged if "DeviceStatsMonitor.on_train_batch_end/cpu_percent" in metrics
    }
    assert sorted(of_training) == [1, 4, 6]
    for metrics in of_training.values():
        for hook in ("start", "end"):
            assert all(0 <= metrics[f"DeviceStatsMonitor.on_train_batch_{hook}/{name}"] <= 100 for name in CPU)
    (evaluated,) = [m for _, m in logged if "DeviceStatsMonitor.on_validation_batch_end/cpu_vm_percent" in m]
    assert evaluated["DeviceStatsMonitor.on_validation_batch_start/cpu_vm_percent"] > 0


def test_evaluations_of_their_own_write_to_the_loggers_and_have_it_not_among_their_results() -> None:
    trainer = tiny_trainer(callbacks=[DeviceStatsMonitor()], logger=CSVLogger("logs", "net"), max_epochs=1)
    assert trainer.test(Net(), loader(4), verbose=False) == [{}]
    trainer.logger.save()
    assert "DeviceStatsMonitor.on_test_batch_end/cpu_percent" in Path("logs/net/version_0/metrics.csv").read_text()


def test_a_subclass_logs_under_its_own_name() -> None:
    class Mine(DeviceStatsMonitor):
        pass

    assert any("Mine.on_train_batch_end/cpu_percent" in metrics for _, metrics in points(Mine()))


def test_nothing_is_logged_of_a_cpu_that_is_not_wanted() -> None:
    assert not any(
        "DeviceStats" in name for _, metrics in points(DeviceStatsMonitor(cpu_stats=False)) for name in metrics
    )


def test_what_cannot_be_logged_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="no logger"):
        tiny_trainer(callbacks=[DeviceStatsMonitor()]).fit(Net(), loader(4))
    tiny_trainer(callbacks=[DeviceStatsMonitor()], fast_dev_run=True).fit(Net(), loader(4))
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ConfigurationError, match="pip install psutil"):
        points(DeviceStatsMonitor())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_allocator_of_a_gpu() -> None:
    held = torch.ones(1000, device="cuda")
    assert device_stats(held.device)["allocated_bytes.all.current"] >= 4000


def logs_on_a_rank() -> Any:
    logged = []
    note = LambdaCallback(on_log=lambda trainer, module, metrics, step: logged.append((step, dict(metrics))))
    trainer = tiny_trainer(
        callbacks=[DeviceStatsMonitor(), note], logger=CSVLogger("logs"), strategy="ddp", devices=2, log_every_n_steps=2
    )
    trainer.fit(Net(), loader(8), loader(6))
    return logged


def test_two_ranks_log_the_same_numbers() -> None:
    first, second = run_ranks(logs_on_a_rank, 2)
    assert first == second
    assert any("DeviceStatsMonitor.on_validation_batch_end/cpu_percent" in metrics for _, metrics in first)
