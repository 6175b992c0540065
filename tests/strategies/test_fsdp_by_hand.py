"""Manual optimization, given-up windows and overridden optimizer steps under FSDP."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paceline as pl

from helpers.ranks import RanksFailed, run_ranks
from helpers.sharded import Block, Layered, batches, full_weights, strategy_of, trained
from helpers.tiny import assert_same, tiny_trainer


class TwoPlayers(pl.Module):
    """Two networks with an optimizer each, trained in turns by hand; `accumulate` goes backward twice a step."""

    def __init__(self, accumulate: bool = False) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.automatic_optimization = False
        self.accumulate = accumulate
        self.maker = nn.Sequential(nn.Linear(4, 6), Block(), Block(), nn.Linear(6, 4))
        self.judge = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        makes, judges = self.optimizers()
        with judges.toggle_model():
            judges.zero_grad()
            self.backward_of(F.mse_loss(self.judge(self.maker(x).detach()).squeeze(-1), y))
            judges.step()
        makes.zero_grad()
        self.toggle_optimizer(makes)
        self.backward_of(-F.mse_loss(self.judge(self.maker(x)).squeeze(-1), y))
        makes.step()
        self.untoggle_optimizer(makes)

    def backward_of(self, loss: Tensor) -> None:
        if self.accumulate:
            self.manual_backward(loss / 4, retain_graph=False)
        else:
            self.manual_backward(loss)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.05, momentum=0.5) for part in (self.maker, self.judge)]


def play(accumulate: bool, strategy: str | None, batch_size: int) -> dict[str, Tensor]:
    module = TwoPlayers(accumulate)
    tiny_trainer(strategy=strategy_of(strategy, {}), max_epochs=2).fit(module, batches(24, batch_size))
    return full_weights(module)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("strategy", "ranks"), [("fsdp", 2), ("fsdp", 3), ("hsdp", 2)])
def test_manual_optimization_of_two_networks_is_that_of_one_process(
    strategy: str, ranks: int, accumulate: bool
) -> None:
    one = play(accumulate, None, 12)
    for weights in run_ranks(play, ranks, accumulate, strategy, 12 // ranks):
        assert_same(weights, one, 1e-6)


class OwnParameter(TwoPlayers):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(3))


def refused() -> None:
    tiny_trainer(strategy="fsdp").fit(OwnParameter(), batches(8, 2))


def test_parameters_of_the_root_are_refused_with_manual_optimization() -> None:
    with pytest.raises(RanksFailed, match=re.escape("OwnParameter has parameters of its own (temperature)")):
        run_ranks(refused, 2)


class GivesUp(pl.Callback):
    """Ends the first epoch in the middle of its second window."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> Any:
        return -1 if trainer.current_epoch == 0 and batch_idx == 3 else None


def given_up(strategy: str | None, batch_size: int, **options: Any) -> dict[str, Tensor]:
    return trained(
        16, batch_size, {"sgd": True}, strategy=strategy_of(strategy, options), callbacks=GivesUp(), max_epochs=2,
        accumulate_grad_batches=2,
    )  # fmt: skip


@pytest.mark.parametrize("every", [True, False])
def test_a_window_that_is_given_up_leaves_no_gradient(every: bool) -> None:
    one = given_up(None, 4)
    for weights in run_ranks(given_up, 2, "fsdp", 2, sync_every_micro_batch=every):
        assert_same(weights, one, 1e-6)


class RepeatsTheWindow(Layered):
    """Steps twice from one window and keeps the loss that the closure gave."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.losses = [float(optimizer_closure())]
        optimizer.step()
        self.losses.append(float(optimizer_closure()))
        optimizer.step()


def repeats(strategy: str | None, batch_size: int) -> Any:
    module = RepeatsTheWindow()
    weights = trained(20, batch_size, module=module, strategy=strategy_of(strategy, {}), global_batch_size=8)
    return weights, module.losses


def test_a_closure_repeats_the_window_and_returns_its_loss() -> None:
    one, losses = repeats(None, 8)
    for weights, found in run_ranks(repeats, 2, "fsdp", 2):
        assert_same(weights, one, 1e-6)
        assert found == pytest.approx(losses, rel=1e-5)
