"""`BaseFinetuning` and `BackboneFinetuning`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from paceline.callbacks import BackboneFinetuning, BaseFinetuning, LambdaCallback
from paceline.errors import ConfigurationError

from helpers.ranks import run_ranks
from helpers.tiny import Regression, assert_same, loader, samples, tiny_trainer, weights


class Net(Regression):
    """A backbone with BatchNorm, below the layer of `Regression`; the optimizer gets what is trainable."""

    def __init__(self, schedule: Callable[[Any], Any] | None = None, interval: str = "epoch") -> None:
        super().__init__()
        torch.manual_seed(11)
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.schedule, self.interval = schedule, interval

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(self.backbone(inputs))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.02)
        if self.schedule is None:
            return optimizer
        scheduler = self.schedule(optimizer)
        config = {"scheduler": scheduler, "interval": self.interval}
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            config["monitor"] = "loss"
        return {"optimizer": optimizer, "lr_scheduler": config}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True)
        return loss


class Thaw(BaseFinetuning):
    """Thaws the second layer in epoch 1 and the first, with BatchNorm, in epoch 3."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone[2], optimizer)
        if epoch == 3:
            self.unfreeze_and_add_param_group([pl_module.backbone[0], pl_module.backbone[1]], optimizer, lr=0.003)


def rates_note(rates: list[list[float]]) -> LambdaCallback:
    def note(trainer: Any, module: Any, *_: Any) -> None:
        rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    return LambdaCallback(on_train_batch_start=note)


# --- helpers -----------------------------------------------------------------------------------------------------
def test_layers_are_flattened() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.child = nn.Linear(1, 1)

    own, plain, norm = Own(), nn.Linear(1, 1), nn.BatchNorm1d(1)
    assert BaseFinetuning.flatten_modules(nn.Sequential(plain, nn.Sequential(norm))) == [plain, norm]
    assert BaseFinetuning.flatten_modules(own) == [own, own.child]
    assert BaseFinetuning.flatten_modules([plain, [norm, nn.ModuleDict({"a": own})]]) == [plain, norm, own, own.child]
    assert BaseFinetuning.flatten_modules(nn.ModuleDict({"a": plain})) == [plain]


def test_freezing_thawing_and_filtering() -> None:
    body = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    linear, norm = body
    BaseFinetuning.freeze(body)
    assert [p.requires_grad for p in body.parameters()] == [False, False, True, True]
    assert norm.track_running_stats
    BaseFinetuning.freeze(body, train_bn=False)
    assert not any(p.requires_grad for p in body.parameters())
    assert not norm.track_running_stats
    assert list(BaseFinetuning.filter_params(body)) == []
    frozen = list(BaseFinetuning.filter_params(body, train_bn=False, requires_grad=False))
    assert all(a is b for a, b in zip(frozen, linear.parameters(), strict=True))
    BaseFinetuning.make_trainable(body)
    assert all(p.requires_grad for p in body.parameters())
    assert norm.track_running_stats
    BaseFinetuning.freeze_module(linear)
    assert len(list(BaseFinetuning.filter_params(body))) == 2


def test_a_group_joins_with_its_rate_and_known_parameters_do_not() -> None:
    first, second = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(first.parameters(), lr=0.5)
    BaseFinetuning.freeze(second)
    BaseFinetuning.unfreeze_and_add_param_group(second, optimizer, train_bn=False)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05]
    assert len(optimizer.param_groups[1]["params"]) == 2
    assert not second[1].weight.requires_grad
    first.requires_grad_(False)
    with pytest.warns(UserWarning, match="2 of the parameters"):
        BaseFinetuning.unfreeze_and_add_param_group(nn.Sequential(first), optimizer)
    assert len(optimizer.param_groups) == 2


# --- runs --------------------------------------------------------------------------------------------------------
def by_hand(epochs: int) -> Net:
    module = Net()
    head, (first, norm, second) = module.layer, module.backbone
    module.backbone.requires_grad_(False)
    norm.track_running_stats = False
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for epoch in range(epochs):
        if epoch == 1:
            second.requires_grad_(True)
            optimizer.add_param_group({"params": list(second.parameters()), "lr": 0.002})
        if epoch == 3:
            first.requires_grad_(True)
            norm.requires_grad_(True)
            norm.track_running_stats = True
            optimizer.add_param_group({"params": [*first.parameters(), *norm.parameters()], "lr": 0.003})
        for batch in zip(*(t.split(4) for t in samples(8).tensors), strict=True):
            optimizer.zero_grad()
            module.loss(batch).backward()
            optimizer.step()
    return module


def test_layers_are_thawed_as_by_hand() -> None:
    module = Net()
    trainer = tiny_trainer(callbacks=[Thaw()], max_epochs=5)
    trainer.fit(module, loader(8, batch_size=4))
    expected = by_hand(5)
    torch.testing.assert_close(dict(module.state_dict()), dict(expected.state_dict()), rtol=0, atol=1e-7)
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [2, 2, 4]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 8])
def test_a_resumed_run_is_exact(steps: int) -> None:
    first = tiny_trainer(callbacks=[Thaw()], max_steps=steps)
    first.fit(Net(), loader(8, batch_size=4))
    path = first.save_checkpoint("middle.ckpt")
    resumed, straight = Net(), Net()
    tiny_trainer(callbacks=[Thaw()], max_epochs=5).fit(resumed, loader(8, batch_size=4), ckpt_path=path)
    tiny_trainer(callbacks=[Thaw()], max_epochs=5).fit(straight, loader(8, batch_size=4))
    torch.testing.assert_close(dict(resumed.state_dict()), dict(straight.state_dict()), rtol=0, atol=0)
    assert [p.requires_grad for p in resumed.parameters()] == [p.requires_grad for p in straight.parameters()]


SCHEDULES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "lambda": (lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)), "step"),
    "multiplicative": (lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9), "step"),
    "step": (lambda o: lr_scheduler.StepLR(o, 2, 0.5), "step"),
    "cosine": (lambda o: lr_scheduler.CosineAnnealingLR(o, 20), "step"),
    "warm restarts": (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3), "step"),
    "one cycle": (lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40), "step"),
    "cyclic": (lambda o: lr_scheduler.CyclicLR(o, 0.02, 0.1, 3, cycle_momentum=False), "step"),
    "sequential": (
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
        ),
        "step",
    ),
    "chained": (
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 3)]),
        "step",
    ),
    "polynomial": (lambda o: lr_scheduler.PolynomialLR(o, 20), "epoch"),
    "plateau": (lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0), "epoch"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_with_the_groups_that_join_in_its_proportion(name: str) -> None:
    def run(limits: Any, path: str | None = None) -> tuple[Any, Net, list[list[float]]]:
        schedule, interval = SCHEDULES[name]
        module, rates = Net(schedule, interval), []
        trainer = tiny_trainer(callbacks=[Thaw(), rates_note(rates)], **limits)
        trainer.fit(module, loader(8, batch_size=4), ckpt_path=path)
        return trainer, module, rates

    _, straight, rates = run({"max_epochs": 5})
    assert [len(now) for now in rates] == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    for now in rates[2:]:
        assert now[1] / now[0] == pytest.approx(0.1, rel=1e-3)
    for now in rates[6:]:
        assert now[2] / now[0] == pytest.approx(0.003 / rates[6][0], rel=1e-3)
    first, _, _ = run({"max_steps": 7})
    _, resumed, _ = run({"max_epochs": 5}, first.save_checkpoint("middle.ckpt"))
    torch.testing.assert_close(dict(resumed.state_dict()), dict(straight.state_dict()), rtol=0, atol=0)


def test_misuse_says_what_to_define() -> None:
    with pytest.raises(NotImplementedError, match="freeze_before_training"):
        tiny_trainer(callbacks=[BaseFinetuning()]).fit(Net(), loader(8))
    with pytest.raises(ConfigurationError, match=r"Regression\.backbone"):
        tiny_trainer(callbacks=[BackboneFinetuning()]).fit(Regression(), loader(8))


# --- the backbone --------------------------------------------------------------------------------------------------
def test_the_backbone_is_frozen_then_trained_at_rates_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paceline")
    rates: list[list[float]] = []
    frozen = []
    note = LambdaCallback(
        on_train_epoch_end=lambda _, module: frozen.append(not module.backbone[0].weight.requires_grad)
    )
    finetuning = BackboneFinetuning(2, lambda_func=lambda epoch: 3.0, verbose=True)
    module = Net()
    start = weights(module)
    warnings.simplefilter("error")
    tiny_trainer(callbacks=[finetuning, rates_note(rates), note], max_epochs=6).fit(module, loader(4, batch_size=4))
    assert frozen == [True, True, False, False, False, False]
    expected = [[0.02], [0.02], [0.02, 0.002], [0.02, 0.006], [0.02, 0.018], [0.02, 0.02]]
    for now, then in zip(rates, expected, strict=True):
        assert now == pytest.approx(then)
    assert not torch.equal(module.backbone[0].weight, start["backbone.0.weight"])
    assert "Current lr: 0.02, Backbone lr: 0.006" in caplog.messages


def test_a_rate_may_be_given_and_exceed_that_of_the_head() -> None:
    rates: list[list[float]] = []
    finetuning = BackboneFinetuning(1, backbone_initial_lr=0.015, should_align=False)
    tiny_trainer(callbacks=[finetuning, rates_note(rates)], max_epochs=3).fit(Net(), loader(4, batch_size=4))
    assert [now[-1] for now in rates] == pytest.approx([0.02, 0.015, 0.03])


@pytest.mark.parametrize("train_bn", [True, False])
def test_batch_norm_of_the_backbone_is_trained_or_not_all_the_time(train_bn: bool) -> None:
    module = Net()
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    seen = []
    note = LambdaCallback(on_train_epoch_end=lambda _, module: seen.append(module.backbone[1].weight.detach().clone()))
    tiny_trainer(callbacks=[BackboneFinetuning(1, train_bn=train_bn), note], max_epochs=2).fit(module, loader(8))
    moved = [not torch.equal(weight, start["backbone.1.weight"]) for weight in seen]
    assert moved == [train_bn, train_bn]
    assert torch.equal(module.backbone[1].running_mean, start["backbone.1.running_mean"]) != train_bn


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_backbones_rate_goes_on_after_a_resume(steps: int) -> None:
    def trainer(**limits: Any) -> Any:
        return tiny_trainer(callbacks=[BackboneFinetuning(1, lambda epoch: 1.5)], **limits)

    first = trainer(max_steps=steps)
    first.fit(Net(), loader(8, batch_size=4))
    path = first.save_checkpoint("middle.ckpt")
    resumed, straight = Net(), Net()
    trainer(max_epochs=4).fit(resumed, loader(8, batch_size=4), ckpt_path=path)
    trainer(max_epochs=4).fit(straight, loader(8, batch_size=4))
    torch.testing.assert_close(dict(resumed.state_dict()), dict(straight.state_dict()), rtol=0, atol=0)


# --- ranks -------------------------------------------------------------------------------------------------------
class Plain(Net):
    """Without BatchNorm, which sees micro-batches, two ranks do what one does."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone[1] = nn.Tanh()


class ThawPlain(Thaw):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)


def finetunes_on_a_rank(save_to: str = "", resume_from: str | None = None) -> Any:
    module = Plain()
    limits = {"max_steps": 7} if save_to else {"max_epochs": 5}
    trainer = tiny_trainer(callbacks=[ThawPlain()], strategy="ddp", devices=2, **limits)
    trainer.fit(module, loader(8), ckpt_path=resume_from)
    return trainer.save_checkpoint(save_to) if save_to else weights(module)


def test_two_ranks_thaw_together_also_after_a_resume(tmp_path: Any) -> None:
    module = Plain()
    tiny_trainer(callbacks=[ThawPlain()], max_epochs=5).fit(module, loader(8, batch_size=4))
    straight = run_ranks(finetunes_on_a_rank, 2)
    for result in straight:
        assert_same(result, module, 1e-6)
    path = run_ranks(finetunes_on_a_rank, 2, save_to=str(tmp_path / "middle.ckpt"))[0]
    for result in run_ranks(finetunes_on_a_rank, 2, resume_from=path):
        assert_same(result, straight[0])
