"""DDP in whole runs: the weights are those of one process on the same global batches, for one reduction a window.

The jobs return what each rank found; what one process finds is computed beside them by a hand-written loop.
"""

from __future__ import annotations

import os
import sys
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import paceline as pl
from paceline.strategies import DDP, Strategy, register_strategy
from paceline.strategies.base import STRATEGIES

from helpers.ranks import RanksFailed, run_ranks
from helpers.scripts import run_script
from helpers.tiny import (
    Regression,
    adam,
    assert_same,
    by_hand,
    global_batches,
    loader,
    samples,
    tiny_trainer,
    weights,
)

OPTIMIZERS = {"sgd": None, "adam": adam}
CLIPPING: dict[str, dict[str, Any]] = {
    "no clipping": {},
    "norm": {"gradient_clip_val": 0.3},
    "value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
}
MATRIX = list(product(OPTIMIZERS, CLIPPING, (1, 3)))
COUNT, EPOCHS = 17, 2  # 17 samples: nothing divides them


# --- the weights of one process -------------------------------------------------------------------------------------
def fit_matrix() -> dict[Any, dict[str, Tensor]]:
    found = {}
    for optimizer, clipping, accumulate in MATRIX:
        module = Regression(OPTIMIZERS[optimizer])
        trainer = tiny_trainer(
            strategy="ddp", max_epochs=EPOCHS, accumulate_grad_batches=accumulate, **CLIPPING[clipping]
        )
        trainer.fit(module, loader(COUNT))
        found[optimizer, clipping, accumulate] = weights(module)
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_ddp_gives_the_weights_of_one_process_on_the_same_global_batches(ranks: int) -> None:
    results = run_ranks(fit_matrix, ranks)
    for optimizer, clipping, accumulate in MATRIX:
        batches = global_batches(COUNT, 2 * accumulate * ranks) * EPOCHS
        clip = CLIPPING[clipping].get("gradient_clip_val", 0.0)
        by = {"norm": {"clip_norm": clip}, "value": {"clip_value": clip}}.get(clipping, {})
        expected = by_hand(batches, OPTIMIZERS[optimizer], **by)
        for result in results:
            assert_same(result[optimizer, clipping, accumulate], expected, 1e-6)


def fit_global_batches(sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    found = []
    for size in sizes:
        module = Regression(adam)
        tiny_trainer(strategy="ddp", global_batch_size=size).fit(module, loader(COUNT))
        found.append(weights(module))
    return found


def test_a_global_batch_size_is_cut_over_ranks_and_micro_batches() -> None:
    sizes = (3, 5, 7, 16)  # in parts of unequal sizes, and of nothing
    for result in run_ranks(fit_global_batches, 3, sizes):
        for size, found in zip(sizes, result, strict=True):
            assert_same(found, by_hand(global_batches(COUNT, size), adam), 1e-6)


class Tokens(Regression):
    """The mean over tokens: targets of -1 count for nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets, mask = batch
        return (F.mse_loss(self(inputs), targets, reduction="none") * mask).sum() / mask.sum().clamp(min=1)

    def loss_weight(self, batch: Any) -> Any:
        return batch[2].sum()


def masks(count: int) -> Tensor:
    return (torch.arange(count) * 7 % 5 < 2).float()


def fit_tokens() -> dict[str, Tensor]:
    module = Tokens(adam)
    data = TensorDataset(*samples(COUNT).tensors, masks(COUNT))
    tiny_trainer(strategy="ddp", accumulate_grad_batches=2).fit(module, DataLoader(data, batch_size=2))
    return weights(module)


def test_a_loss_weight_makes_token_means_exact_over_ranks_and_micro_batches() -> None:
    mask = masks(COUNT).bool()
    batches = [(inputs[mask[i : i + 12]], targets[mask[i : i + 12]])
               for i, (inputs, targets) in zip((0, 12), global_batches(COUNT, 12), strict=True)]  # fmt: skip
    for result in run_ranks(fit_tokens, 3):
        assert_same(result, by_hand(batches, adam), 1e-6)


# --- one reduction a window -----------------------------------------------------------------------------------------
class CountsReductions(pl.Callback):
    """How many gradient buckets DistributedDataParallel reduced, told by torch's own hook."""

    count = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.strategy._wrapped.register_comm_hook(self, CountsReductions.reduce)

    def reduce(self, bucket):  # torch refuses annotations that are strings
        self.count += 1
        buffer = bucket.buffer() / torch.distributed.get_world_size()
        work = torch.distributed.all_reduce(buffer, async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])


def count_reductions(accumulate: int) -> Any:
    counts, module = CountsReductions(), Regression()
    trainer = tiny_trainer(strategy="ddp", accumulate_grad_batches=accumulate, max_epochs=2, callbacks=counts)
    trainer.fit(module, loader(COUNT))
    return counts.count, trainer.global_step, weights(module)


@pytest.mark.parametrize("accumulate", [1, 3, 4])
def test_gradients_are_reduced_once_a_window(accumulate: int) -> None:
    for count, steps, found in run_ranks(count_reductions, 2, accumulate):
        assert count == steps == 2 * -(-COUNT // (4 * accumulate))
        assert_same(found, by_hand(global_batches(COUNT, 4 * accumulate) * 2), 1e-6)


# --- steps without a loss -------------------------------------------------------------------------------------------
class SkipsOnRankOne(Regression):
    """Rank 1 has no loss for batch 0; in batch 1 nobody has one."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1 or (batch_idx == 0 and self.global_rank == 1):
            return None
        return self.loss(batch)


def fit_skipping(strategy: str, accumulate: int) -> Any:
    module = SkipsOnRankOne()
    trainer = tiny_trainer(strategy=strategy, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(12))
    return weights(module), trainer.global_step


def skipping_by_hand() -> Regression:
    """Batches of two ranks, where what was skipped has a gradient of zero and keeps its weight."""
    module = Regression()
    optimizer = module.configure_optimizers()
    batches = global_batches(12, 2)
    for kept in ([0], [], [4, 5]):
        optimizer.zero_grad()
        sum((module.loss(batches[i]) / 2 for i in kept), module.layer.weight.sum() * 0).backward()
        optimizer.step()
    return module


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_a_rank_whose_step_returns_none_keeps_up_with_gradients_of_zero(strategy: str) -> None:
    expected = skipping_by_hand()
    for found, steps in run_ranks(fit_skipping, 2, strategy, 1):
        assert_same(found, expected, 1e-6)
        assert steps == 3


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_none_inside_a_window_keeps_its_weight(strategy: str) -> None:
    module = Regression()
    optimizer = module.configure_optimizers()
    batches = global_batches(12, 2)  # windows of 8 and 4 samples: batches 0 to 3, then 4 and 5
    for window, kept in ((4, [0]), (2, [4, 5])):
        optimizer.zero_grad()
        sum(module.loss(batches[i]) / window for i in kept).backward()
        optimizer.step()
    for found, steps in run_ranks(fit_skipping, 2, strategy, 2):
        assert_same(found, module, 1e-6)
        assert steps == 2


# --- parameters -----------------------------------------------------------------------------------------------------
class Unused(Regression):
    """Its second layer takes part in every other batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(1, 1)
        nn.init.constant_(self.second.weight, 0.5)
        nn.init.constant_(self.second.bias, 0.25)
        self.batch_idx = 0

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        return outputs if self.batch_idx % 2 else self.second(outputs[:, None]).squeeze(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batch_idx = batch_idx
        return self.loss(batch)


def fit_unused(by_name: bool) -> dict[str, Tensor]:
    module = Unused()
    strategy = "ddp_find_unused_parameters_true" if by_name else DDP(find_unused_parameters=True)
    tiny_trainer(strategy=strategy).fit(module, loader(16))
    return weights(module)


@pytest.mark.parametrize("by_name", [True, False])
def test_unused_parameters_are_found_where_ddp_is_told_to(by_name: bool) -> None:
    straight = Unused()
    optimizer = straight.configure_optimizers()
    for batch_idx, batch in enumerate(global_batches(16, 4)):
        optimizer.zero_grad()
        straight.training_step(batch, batch_idx).backward()
        optimizer.step()
    for found in run_ranks(fit_unused, 2, by_name):
        assert_same(found, straight, 1e-6)


class ThawsLater(Regression):
    """Its bias is frozen in the first epoch."""

    def on_train_epoch_start(self) -> None:
        self.layer.bias.requires_grad_(self.current_epoch > 0)


def fit_thawing(strategy: str) -> dict[str, Tensor]:
    module = ThawsLater()
    module.layer.bias.requires_grad_(False)
    tiny_trainer(strategy=strategy, max_epochs=3).fit(module, loader(12, batch_size=2 if strategy == "ddp" else 4))
    return weights(module)


def test_parameters_that_are_thawed_between_epochs_are_reduced_from_then_on() -> None:
    alone = fit_thawing("single")
    assert alone["layer.bias"] != 0.125
    for found in run_ranks(fit_thawing_on_ranks, 2):
        assert_same(found, alone, 1e-6)


def fit_thawing_on_ranks() -> dict[str, Tensor]:
    return fit_thawing("ddp")


def fit_from_own_weights() -> dict[str, Tensor]:
    module = Regression()
    rank = int(os.environ["RANK"])
    nn.init.constant_(module.layer.weight, 1.0 + rank)
    tiny_trainer(strategy="ddp").fit(module, loader(8))
    return weights(module)


def test_all_ranks_train_from_the_weights_of_rank_0() -> None:
    first, second = run_ranks(fit_from_own_weights, 2)
    assert_same(first, second)


def fit_a_frozen_module() -> Any:
    module = Regression()
    rank = int(os.environ["RANK"])
    nn.init.constant_(module.layer.weight, 1.0 + rank)
    module.requires_grad_(False)
    module.automatic_optimization = False
    module.training_step = lambda batch, batch_idx: None
    tiny_trainer(strategy="ddp").fit(module, loader(8))
    return weights(module)


def test_a_module_without_trainable_parameters_runs_with_the_weights_of_rank_0() -> None:
    first, second = run_ranks(fit_a_frozen_module, 2)
    assert_same(first, second)
    assert first["layer.weight"][0, 0] == 1.0


# --- manual optimization --------------------------------------------------------------------------------------------
class TwoByHand(pl.Module):
    """Two parts with an optimizer each, stepped after every second batch; one forward uses both."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.left, self.right = Regression(), Regression()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        left, right = self.optimizers()
        self.manual_backward(self.left.loss(batch) / 2)
        self.manual_backward((self.right(self.left(batch[0])[:, None].expand(-1, 3)) ** 2).mean() / 2)
        if batch_idx % 2:
            left.step()
            left.zero_grad()
            right.step()
            right.zero_grad()

    def configure_optimizers(self) -> Any:
        return adam(self.left.parameters()), torch.optim.SGD(self.right.parameters(), lr=0.1)


def fit_by_hand(strategy: str, batch_size: int) -> Any:
    module = TwoByHand()
    trainer = tiny_trainer(strategy=strategy, max_epochs=2)
    trainer.fit(module, loader(16, batch_size=batch_size))
    return weights(module), trainer.global_step


def test_manual_optimization_gives_the_weights_of_one_process() -> None:
    alone, steps = fit_by_hand("single", 4)
    for found, steps_here in run_ranks(fit_by_hand, 2, "ddp", 2):
        assert_same(found, alone, 1e-6)
        assert steps_here == steps == 4


# --- other ways through the loop ------------------------------------------------------------------------------------
class SkipsTheRest(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 else None


def fit_skipping_the_rest() -> dict[str, Tensor]:
    module = Regression()
    trainer = tiny_trainer(strategy="ddp", max_epochs=2, accumulate_grad_batches=2, callbacks=SkipsTheRest())
    trainer.fit(module, loader(24))
    return weights(module)


def test_skipping_the_rest_of_an_epoch_inside_a_window_drops_the_window_on_all_ranks() -> None:
    for found in run_ranks(fit_skipping_the_rest, 2):
        assert_same(found, by_hand(global_batches(24, 8)[:1] * 2), 1e-6)


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=3)


def fit_lbfgs(strategy: str, batch_size: int) -> dict[str, Tensor]:
    module = Regression(lbfgs)
    tiny_trainer(strategy=strategy, accumulate_grad_batches=2).fit(module, loader(16, batch_size=batch_size))
    return weights(module)


def test_lbfgs_sees_the_loss_and_gradients_of_all_ranks() -> None:
    alone = fit_lbfgs("single", 4)
    for found in run_ranks(fit_lbfgs, 2, "ddp", 2):
        assert_same(found, alone, 1e-5)


def fit_in(precision: str, strategy: str, batch_size: int) -> dict[str, Tensor]:
    module = Regression()
    tiny_trainer(strategy=strategy, precision=precision, gradient_clip_val=1.0).fit(module, loader(16, batch_size))
    return weights(module)


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-12), ("16-mixed", 1e-2), ("bf16-mixed", 5e-2)])
def test_other_precisions_train_under_ddp(precision: str, tolerance: float) -> None:
    alone = fit_in(precision, "single", 4)
    first, second = run_ranks(fit_in, 2, precision, "ddp", 2)
    assert_same(first, second)
    assert_same(first, alone, tolerance)


def sync_batchnorm_on_cpu() -> None:
    tiny_trainer(strategy="ddp", sync_batchnorm=True).fit(Regression(), loader(8))


def test_sync_batchnorm_on_the_cpu_is_refused() -> None:
    with pytest.raises(RanksFailed, match="sync_batchnorm=True: torch has no SyncBatchNorm on the CPU"):
        run_ranks(sync_batchnorm_on_cpu, 2)


# --- strategies of one's own ----------------------------------------------------------------------------------------
class SharedData(DDP):
    """Pairs of ranks read the same data, as ranks do that share a model."""

    @property
    def data_rank(self) -> int:
        return self.rank // 2

    @property
    def data_ranks(self) -> int:
        return self.world_size // 2


class Reads(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.read.append(len(batch[0]))
        return super().training_step(batch, batch_idx)


def fit_shared() -> Any:
    module = Reads()
    tiny_trainer(strategy=SharedData()).fit(module, loader(12))
    return weights(module), module.read


@pytest.mark.parametrize("ranks", [2, 4])
def test_which_data_a_rank_reads_is_told_by_its_strategy(ranks: int) -> None:
    for found, read in run_ranks(fit_shared, ranks):
        assert_same(found, by_hand(global_batches(12, ranks)), 1e-6)
        assert sum(read) == 12 // (ranks // 2)


class AveragesByHand(Strategy):
    """Data parallel in a few lines: gradients are averaged by one flat all-reduce before they are looked at."""

    distributed = True

    def wrap(self) -> None:
        assert self.module is not None
        for parameter in self.module.parameters():
            self.broadcast(parameter.detach())

    def unscale_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        flat = self.all_reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]), "mean")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        super().unscale_gradients(optimizer)


def fit_with_own_strategy(by_name: bool) -> Any:
    register_strategy("averages_by_hand")(AveragesByHand)
    module = Regression(adam)
    trainer = tiny_trainer(
        strategy="averages_by_hand" if by_name else AveragesByHand(), accumulate_grad_batches=2, gradient_clip_val=0.3
    )
    trainer.fit(module, loader(COUNT))
    STRATEGIES.pop("averages_by_hand")
    return weights(module), type(trainer.strategy).__name__


@pytest.mark.parametrize("by_name", [True, False])
def test_a_users_own_strategy_trains_by_name_and_as_an_object(by_name: bool) -> None:
    for found, name in run_ranks(fit_with_own_strategy, 2, by_name):
        assert_same(found, by_hand(global_batches(COUNT, 8), adam, clip_norm=0.3), 1e-6)
        assert name == "AveragesByHand"


ENDS_WITH_COLLECTIVES = """
import torch
import torch.distributed as dist
from helpers.tiny import Regression, loader, tiny_trainer

tiny_trainer(strategy="ddp", max_steps=1).fit(Regression(), loader(8))
for tensor in [torch.ones(1000) for _ in range(50)]:
    dist.all_reduce(tensor, async_op=True)
"""


@pytest.mark.parametrize("begins", ["", "import torch.distributed as dist\ndist.init_process_group('gloo')\n"])
def test_a_script_may_end_right_after_collectives(begins: str) -> None:
    """gloo's threads are still at them as the script ends; without a pause most such processes are aborted."""
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = run_script(begins + ENDS_WITH_COLLECTIVES, launcher="torchrun", nproc=2, env=environment)
    assert result.returncode == 0, result.stderr
