"""`LearningRateMonitor`: names, steps and values, joined with the other logged points."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, StepLR

from paceline.callbacks import JSONLLogger, LearningRateMonitor
from paceline.callbacks.lr_monitor import named_param_groups
from paceline.errors import ConfigurationError
from paceline.trainer.optim import NullOptimizer, SchedulerConfig

from helpers.callback_runs import BATCHES, Scripted, loader, trainer


class Scheduled(Scripted):
    def __init__(self, interval: str = "step", name: str | None = None, **options: Any) -> None:
        super().__init__()
        self.interval, self.name, self.options = interval, name, options

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), **({"lr": 1.0} | self.options))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1 / (1 + count))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.interval, "name": self.name},
        }


def logged(tmp_path: Path, model: Scripted, monitor: LearningRateMonitor, **options: Any) -> list[dict[str, Any]]:
    options = {"log_every_n_steps": 3} | options
    trainer(tmp_path, monitor, logger=JSONLLogger(tmp_path), **options).fit(model, loader())
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_each_point_of_training_has_the_rate_that_its_update_used(tmp_path: Path) -> None:
    monitor = LearningRateMonitor()
    points = logged(tmp_path, Scheduled(), monitor)
    assert [p["step"] for p in points] == [1, 3, 6, 8, 9, 12, 15, 16]
    assert [p["lr-SGD"] for p in points] == pytest.approx([1 / p["step"] for p in points])
    assert all("train_loss" in p for p in points)
    assert monitor.lrs == {"lr-SGD": pytest.approx([1 / p["step"] for p in points])}


def test_a_scheduler_of_epochs_is_logged_by_epochs(tmp_path: Path) -> None:
    points = logged(tmp_path, Scheduled("epoch"), LearningRateMonitor())
    assert [(p["step"], p["lr-SGD"]) for p in points if "lr-SGD" in p] == [(BATCHES, 1.0), (2 * BATCHES, 0.5)]


def test_the_interval_can_be_chosen(tmp_path: Path) -> None:
    points = logged(tmp_path, Scheduled("epoch"), LearningRateMonitor("step"))
    assert [p["lr-SGD"] for p in points] == [1.0] * 4 + [0.5] * 4
    points = logged(tmp_path / "b", Scheduled("step"), LearningRateMonitor("epoch"))
    rates = [(p["step"], p["lr-SGD"]) for p in points if "lr-SGD" in p]
    assert rates == [(BATCHES, 1.0), (2 * BATCHES, pytest.approx(1 / (BATCHES + 1)))]


def test_accumulated_updates_have_their_own_rate(tmp_path: Path) -> None:
    points = logged(tmp_path, Scheduled(), LearningRateMonitor(), accumulate_grad_batches=2, log_every_n_steps=1)
    assert [p["step"] for p in points] == [*range(1, 9)]
    assert [p["lr-SGD"] for p in points] == pytest.approx([1 / p["step"] for p in points])


def test_without_a_scheduler_rates_are_logged_too(tmp_path: Path) -> None:
    points = logged(tmp_path, Scripted(lr=0.25), LearningRateMonitor())
    assert [p["lr-SGD"] for p in points] == [0.25] * 8


def test_names_of_schedulers_and_groups(tmp_path: Path) -> None:
    class Groups(Scheduled):
        def configure_optimizers(self) -> Any:
            groups = [{"params": [self.layer.weight]}, {"params": [self.layer.bias], "lr": 0.5}]
            optimizer = torch.optim.Adam(groups, lr=1.0)
            if self.name is None:
                return optimizer
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            return [optimizer], [{"scheduler": scheduler, "name": self.name}]

    point = logged(tmp_path / "a", Groups(), LearningRateMonitor("step"))[0]
    assert (point["lr-Adam/pg1"], point["lr-Adam/pg2"]) == (1.0, 0.5)
    point = logged(tmp_path / "b", Groups(name="mine"), LearningRateMonitor("step"))[0]
    assert (point["mine/pg1"], point["mine/pg2"]) == (1.0, 0.5)


def test_momentum_and_weight_decay(tmp_path: Path) -> None:
    monitor = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    point = logged(tmp_path, Scheduled(momentum=0.9, weight_decay=0.01), monitor)[0]
    assert (point["lr-SGD-momentum"], point["lr-SGD-weight_decay"]) == (0.9, 0.01)


def test_a_rate_that_is_a_tensor_is_logged(tmp_path: Path) -> None:
    class Tensors(Scripted):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=torch.tensor(0.5))

    monitor = LearningRateMonitor()
    assert [p["lr-Adam"] for p in logged(tmp_path, Tensors(), monitor)] == [0.5] * 8


def test_it_needs_a_logger(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has no logger"):
        trainer(tmp_path, LearningRateMonitor()).fit(Scripted(), loader())
    trainer(tmp_path, LearningRateMonitor(), fast_dev_run=True).fit(Scripted(), loader())  # which has none


def test_a_bad_interval_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="logging_interval='batch'"):
        LearningRateMonitor("batch")  # type: ignore[arg-type]


# --- names -------------------------------------------------------------------------------------------------------
def optimizer(kind: type[Optimizer] = SGD) -> Optimizer:
    return kind(nn.Linear(2, 1).parameters(), lr=0.1)  # type: ignore[call-arg]


def names(optimizers: list[Optimizer], configs: list[SchedulerConfig]) -> list[str]:
    return [named.name for named in named_param_groups(optimizers, configs)]


def grouped(*names):
    groups = [{"params": nn.Linear(1, 1).parameters(), **({"name": name} if name else {})} for name in names]
    return SGD(groups, lr=0.1)


def test_learning_rates_are_named_after_optimizers_and_counted():
    class Own(Adam):
        pass

    opts = [optimizer(Adam), optimizer(), optimizer(Adam), optimizer(Own)]
    assert names(opts, []) == ["lr-Adam", "lr-SGD", "lr-Adam-1", "lr-Own"]
    assert names([NullOptimizer()], []) == []


def test_schedulers_come_first_and_may_have_names():
    a, b = optimizer(Adam), optimizer(Adam)
    assert names([a, b], [SchedulerConfig(StepLR(b, 1))]) == ["lr-Adam", "lr-Adam-1"]
    assert named_param_groups([a, b], [SchedulerConfig(StepLR(b, 1))])[0].group is b.param_groups[0]
    assert names([a, b], [SchedulerConfig(StepLR(b, 1), name="gen")]) == ["gen", "lr-Adam"]
    assert names([a, b], [SchedulerConfig(SimpleNamespace(optimizer=None)), SchedulerConfig(object())]) == [
        "lr-Adam",
        "lr-Adam-1",
    ]


def test_two_schedulers_of_one_optimizer_are_counted_too():
    opt = optimizer()
    configs = [SchedulerConfig(StepLR(opt, 1)), SchedulerConfig(LambdaLR(opt, lambda _: 1.0), interval="step")]
    named = named_param_groups([opt], configs)
    assert [(group.name, group.interval) for group in named] == [("lr-SGD", "epoch"), ("lr-SGD-1", "step")]
    assert named_param_groups([opt], [])[0].interval is None


def test_several_parameter_groups_are_numbered_or_named():
    assert names([grouped(None, None)], []) == ["lr-SGD/pg1", "lr-SGD/pg2"]
    assert names([grouped("x", None)], []) == ["lr-SGD/x", "lr-SGD/pg2"]
    assert names([grouped("x")], []) == ["lr-SGD/x"]
    opt = grouped("x", "y")
    assert names([opt], [SchedulerConfig(StepLR(opt, 1), name="hi")]) == ["hi/x", "hi/y"]


def test_equal_names_of_parameter_groups_are_refused():
    with pytest.raises(ConfigurationError, match=r"lr-SGD has several parameter groups with the names \['x'\]"):
        names([grouped("x", "x")], [])
