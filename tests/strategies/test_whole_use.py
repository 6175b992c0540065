"""What users do with a sharded model as if it were whole: as on one process, or refused with a reason."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from paceline.strategies import FSDP

from helpers.ranks import RanksFailed, run_ranks
from helpers.sharded import Layered, batches, trained
from helpers.tiny import assert_same, tiny_trainer

CUT = {"count": 20, "batch_size": 4, "global_batch_size": 8}


def fit_of(kind: type[Layered]) -> dict[str, Tensor]:
    return trained(module=kind(sgd=True), strategy="fsdp", **CUT)


def assert_like_one_process(kind: type[Layered]) -> None:
    one = trained(20, batch_size=8, module=kind(sgd=True))
    for weights in run_ranks(fit_of, 2, kind):
        assert_same(weights, one, 1e-6)


# --- parameters in the loss -------------------------------------------------------------------------------------------
def squares(model: nn.Module) -> Tensor:
    return torch.stack([p.pow(2).sum() for p in model.parameters()]).sum()


class OtherMethod(Layered):
    def forward(self, x: Tensor) -> Tensor:
        block = self.blocks[0]
        return self.last(block.down(block.up(self.first(x)))).mean(-1)


class Penalised(Layered):
    """Adds the weights of a block, which are shards there, to its loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) + 0.1 * squares(self.blocks[1])


class PenalisedInFull(Layered):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        weight = self.blocks[1].up.weight
        return (
            self.loss(batch) + 0.1 * (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).pow(2).sum()
        )


class TwoTypes(Layered):
    def build(self) -> None:
        super().build()
        self.blocks[0].up.double()


class NewHead(Layered):
    def on_fit_start(self) -> None:
        self.last = nn.Linear(6, 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.blocks.parameters(), lr=0.1)


class Unsharded(Layered):
    """Gathers what it penalises; the rest of the model is gathered anyway."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        for block in self.blocks:
            getattr(block, "unshard", tuple)()
        return loss + 0.1 * squares(self)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OtherMethod, "A step used parameters of a block outside the forward of that block"),
        (Penalised, "A step used parameters of a block outside the forward of that block"),
        (PenalisedInFull, "A step used 'blocks.1.up.weight' outside the forward of that block"),
        (NewHead, "'last.bias' came into the module after FSDP had sharded it, so each rank would train its own"),
        (TwoTypes, "FSDP gathers what a block trains in one type, but there are several: {torch.float"),
    ],
)
def test_what_would_be_trained_by_each_rank_alone_is_refused(kind: type[Layered], message: str) -> None:
    with pytest.raises(RanksFailed, match=re.escape(message)) as failed:
        run_ranks(fit_of, 2, kind)
    assert {error.type_name for error in failed.value.errors.values()} == {"ConfigurationError"}


def test_a_block_that_is_gathered_by_hand_may_be_used_in_the_loss() -> None:
    assert_like_one_process(Unsharded)


class GradientPenalty(Layered):
    def loss(self, batch: Any) -> Tensor:
        x = batch[0].requires_grad_()
        (slope,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
        return super().loss(batch) + slope.square().sum(1).mean()


def fit_in_one_block() -> dict[str, Tensor]:
    return trained(module=GradientPenalty(sgd=True, lr=0.01), strategy=FSDP(blocks=[]), **CUT)


def test_gradients_of_gradients_are_exact_in_one_block() -> None:
    one = trained(20, batch_size=8, module=GradientPenalty(sgd=True, lr=0.01))
    for weights in run_ranks(fit_in_one_block, 2):
        assert_same(weights, one, 1e-6)


# --- parameters that only some ranks use ------------------------------------------------------------------------------
class Experts(Layered):
    """Each sample goes to the expert of its sign."""

    def build(self) -> None:
        super().build()
        self.experts = nn.ModuleDict({"low": nn.Linear(6, 1), "high": nn.Linear(6, 1)})

    def forward(self, x: Tensor) -> Tensor:
        kinds = ["low" if float(sample.sum()) < 0 else "high" for sample in x]
        return torch.cat([self.experts[kind](self.first(sample)) for kind, sample in zip(kinds, x, strict=True)])


class ExpertOfRank(Experts):
    """As many numbers on each rank, so that torch takes one expert's gradients for the other's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[["low", "high"][self.global_rank]](self.first(x)).mean(-1)


def fit_experts(kind: type[Layered], find: bool) -> dict[str, Tensor]:
    return trained(20, 2, module=kind(sgd=True), strategy=FSDP(find_unused_parameters=find), global_batch_size=4)


@pytest.mark.skipif(not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="torch can since 2.13")
def test_ranks_may_use_different_parameters_where_they_are_told_to_find_them() -> None:
    one = trained(20, 4, module=Experts(sgd=True))
    for weights in run_ranks(fit_experts, 2, Experts, True):
        assert_same(weights, one, 1e-6)


def test_ranks_that_use_different_parameters_are_told_which() -> None:
    message = "Some ranks trained parameters ('experts.high.bias', 'experts.high.weight', 'experts.low.bias', ...) that"
    with pytest.raises(RanksFailed, match=re.escape(message)) as failed:
        run_ranks(fit_experts, 2, ExpertOfRank, False)
    assert len(failed.value.errors) == 2


# --- hooks on gradients ----------------------------------------------------------------------------------------------
def halve(gradient: Tensor) -> Tensor:
    return gradient / 2


def halve_in_place(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad /= 2


class Hooked(Layered):
    def build(self) -> None:
        super().build()
        self.last.weight.register_hook(halve)


class HookedLater(Layered):
    def on_fit_start(self) -> None:
        self.blocks[0].up.weight.register_hook(halve)


class HookedTooEarly(Layered):
    def build(self) -> None:
        super().build()
        self.last.weight.register_post_accumulate_grad_hook(halve_in_place)


class HookedInTime(Layered):
    def on_fit_start(self) -> None:
        self.last.weight.register_post_accumulate_grad_hook(halve_in_place)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Hooked, "'last.weight' has a hook on its gradient (register_hook), which would never run"),
        (HookedLater, "'blocks.0.up.weight' has a hook on its gradient (register_hook), which would never run"),
        (HookedTooEarly, "'last.weight' has a hook (register_post_accumulate_grad_hook), which is lost"),
    ],
)
def test_a_hook_that_would_never_run_is_an_error(kind: type[Layered], message: str) -> None:
    with pytest.raises(RanksFailed, match=re.escape(message)):
        run_ranks(fit_of, 2, kind)


def test_a_hook_on_the_summed_gradient_runs() -> None:
    assert_like_one_process(HookedInTime)


# --- memory in another order ------------------------------------------------------------------------------------------
class ChannelsLast(Layered):
    """Convolutions in the memory format that suits them."""

    def build(self) -> None:
        super().build()
        self.images = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1))
        self.images.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.images(x.view(-1, 1, 2, 2)).mean((1, 2, 3))


def test_weights_in_channels_last_are_sharded() -> None:
    assert_like_one_process(ChannelsLast)


# --- whole weights loaded ---------------------------------------------------------------------------------------------
OTHER = {name: torch.linspace(-0.3, 0.4, p.numel()).view(p.shape) for name, p in Layered().state_dict().items()}


class Loads(Layered):
    """Takes whole tensors into shards: all of them, and those of a part."""

    def on_fit_start(self) -> None:
        self.load_state_dict(OTHER)
        self.blocks[1].load_state_dict(Layered().blocks[2].state_dict())


class BuildsAgain(Layered):
    def __init__(self) -> None:
        super().__init__(late=True)

    def configure_model(self) -> None:
        self.build()


def runs_called_twice(kind: type[Layered]) -> None:
    module = kind()
    for _ in range(2):
        tiny_trainer(strategy="fsdp").test(module, batches(4, 2), verbose=False)


def test_load_state_dict_takes_whole_tensors_into_shards() -> None:
    assert_like_one_process(Loads)


def test_weights_that_would_be_lost_are_an_error() -> None:
    message = "configure_model of BuildsAgain built layers anew in a second call, so what was trained is lost"
    with pytest.raises(RanksFailed, match=re.escape(message)):
        run_ranks(runs_called_twice, 2, BuildsAgain)


# --- norms logged -----------------------------------------------------------------------------------------------------
class LogsNorms(Layered):
    """Logs norms of gradients and weights, which are shards outside of steps and within."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("grad", torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("weight", self.blocks[0].up.weight.norm())


def norms(strategy: str, batch_size: int) -> dict[str, float]:
    module = LogsNorms(sgd=True)
    trainer = tiny_trainer(strategy=strategy, num_sanity_val_steps=0)
    trainer.fit(module, batches(16, batch_size), batches(5, 2))  # three batches: one rank runs a ghost
    return {name: float(trainer.callback_metrics[name]) for name in ("grad", "weight")}


def test_norms_of_shards_are_logged_whole() -> None:
    expected = norms("auto", 8)
    for found in run_ranks(norms, 2, "fsdp", 4):
        assert found == pytest.approx(expected, rel=1e-5)
