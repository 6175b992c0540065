"""However a global batch is cut over micro-batches and ranks, its gradient is that of one big batch: 1e-6, relative.

Sequences have 1 to 9 tokens and the loss is a mean over tokens, so no two micro-batches weigh the same. The last global
batch is short, so that some ranks have no sample in it. All cases of one number of ranks run in one job; "pytest -s"
shows the largest error of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

import paceline as pl
from paceline.strategies import FSDP, HSDP, Strategy

from helpers.ranks import run_ranks
from helpers.tiny import tiny_trainer

TOLERANCE = 1e-6
TOKENS, FEATURES, HIDDEN = 9, 4, 5
GLOBAL_BATCH = 42  # cut by 1, 2, 3 ranks x 1, 2, 3, 7 micro-batches
COUNTS = (85, 89)  # global batches of 42, 42 and 1 or 5
PARTS = (1, 2, 3, 7)
BOTH = [(count, parts) for parts in PARTS for count in COUNTS]
IN_TURN = list(zip(COUNTS * 2, PARTS, strict=True))  # for variations on the theme

Sample = tuple[Tensor, Tensor, Tensor]


class Sequences(Dataset[Sample]):
    """Inputs, targets and a mask of each sequence's tokens."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(7)
        most = max(COUNTS)
        self.inputs = torch.randn(most, TOKENS, FEATURES, generator=generator)
        self.targets = torch.randn(most, TOKENS, generator=generator)
        lengths = torch.randint(1, TOKENS + 1, (most,), generator=generator)
        self.masks = (torch.arange(TOKENS) < lengths[:, None]).float()
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return self.inputs[index], self.targets[index], self.masks[index]

    def batch(self, indices: list[int]) -> Sample:
        return self.inputs[indices], self.targets[indices], self.masks[indices]


class Stream(IterableDataset[Sample]):
    """The same sequences, one after another."""

    def __init__(self, count: int) -> None:
        self.sequences = Sequences(count)

    def __iter__(self) -> Iterator[Sample]:
        return (self.sequences[i] for i in range(len(self.sequences)))


class Network(pl.Module):
    """Two layers without matrix products, which autocast would compute in half precision.

    `per_token`: the loss is a mean over tokens, and `TokenNetwork` says so to the trainer; else over sequences.
    """

    per_token = False

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(torch.randn(HIDDEN, FEATURES, generator=generator))
        self.bias = nn.Parameter(torch.randn(HIDDEN, generator=generator))
        self.second = nn.Parameter(torch.randn(HIDDEN, generator=generator))
        self.gradients: list[Tensor] = []

    def loss(self, batch: Sample) -> Tensor:
        inputs, targets, mask = batch
        hidden = torch.tanh((inputs[..., None, :] * self.first).sum(-1) + self.bias)
        errors = ((hidden * self.second).sum(-1) - targets) ** 2 * mask
        return errors.sum() / mask.sum() if self.per_token else errors.sum(1).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step > len(self.gradients):  # the end of a window: as they were stepped with, clipped too
            self.gradients.append(gradient(self))


class TokenNetwork(Network):
    per_token = True

    def loss_weight(self, batch: Sample) -> Tensor:
        return batch[2].sum()


def gradient(module: nn.Module) -> Tensor:
    """All gradients as one vector; a collective where they are sharded."""
    return torch.cat([whole(p.grad).flatten() for p in module.parameters() if p.grad is not None])


def whole(tensor: Any) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (full() if full is not None else tensor).detach().clone()


class Logged(pl.Callback):
    """The losses that reached the loggers: one a step, then the epoch's."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.epoch = 0.0

    def on_log(self, trainer: Any, pl_module: Any, metrics: dict[str, float], step: int) -> None:
        if "loss_step" in metrics:
            self.steps.append(metrics["loss_step"])
        self.epoch = metrics.get("loss_epoch", 0.0)


# --- the cases ------------------------------------------------------------------------------------------------------
def ragged(count: int, parts: int, ranks: int) -> list[list[int]]:
    """Batches of 1, 2, 3, 4, 1, 2, ... sequences, as a sampler that groups them would make."""
    batches, start = [], 0
    while start < count:
        size = len(batches) % 4 + 1
        batches.append(list(range(start, min(start + size, count))))
        start += size
    return batches


def planned(count: int, parts: int, ranks: int) -> tuple[Any, dict[str, Any], list[list[int]]]:
    loader = DataLoader(Sequences(count), batch_size=-(-GLOBAL_BATCH // (ranks * parts)))
    return loader, {"global_batch_size": GLOBAL_BATCH}, blocks(list(range(count)), GLOBAL_BATCH)


def streamed(count: int, parts: int, ranks: int) -> tuple[Any, dict[str, Any], list[list[int]]]:
    """Items are dealt to the ranks one by one, so a window is a block of the stream."""
    batch_size = GLOBAL_BATCH // (ranks * parts)
    loader = DataLoader(Stream(count), batch_size=batch_size)
    arguments = {"accumulate_grad_batches": parts}
    return loader, arguments, blocks(list(range(count)), batch_size * ranks * parts)


def dealt(count: int, parts: int, ranks: int) -> tuple[Any, dict[str, Any], list[list[int]]]:
    """A user's batch sampler: its batches are dealt whole, `parts * ranks` a window."""
    batches = ragged(count, parts, ranks)
    loader = DataLoader(Sequences(count), batch_sampler=Fixed(SequentialSampler(range(count)), batches))
    windows = [[i for batch in window for i in batch] for window in blocks(batches, parts * ranks)]
    return loader, {"accumulate_grad_batches": parts}, windows


def listed(count: int, parts: int, ranks: int) -> tuple[Any, dict[str, Any], list[list[int]]]:
    """A list of ragged batches: no indices, and nothing known before it is read."""
    batches, sequences = ragged(count, parts, ranks), Sequences(count)
    windows = [[i for batch in window for i in batch] for window in blocks(batches, parts * ranks)]
    return [sequences.batch(batch) for batch in batches], {"accumulate_grad_batches": parts}, windows


class Fixed(BatchSampler):
    def __init__(self, sampler: Any, batches: list[list[int]]) -> None:
        super().__init__(sampler, 1, drop_last=False)
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def blocks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


#: name -> (data, module, trainer arguments)
CASES: dict[str, tuple[Any, type[Network], dict[str, Any]]] = {
    "tokens": (planned, TokenNetwork, {}),
    "sequences": (planned, Network, {}),
    "clipped by norm": (planned, TokenNetwork, {"gradient_clip_val": 0.1}),
    "clipped by value": (planned, TokenNetwork, {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}),
    "scaled for fp16": (planned, TokenNetwork, {"precision": "16-mixed"}),
    "stream of tokens": (streamed, TokenNetwork, {}),
    "stream of sequences": (streamed, Network, {}),
    "batch sampler, tokens": (dealt, TokenNetwork, {}),
    "batch sampler, sequences": (dealt, Network, {}),
    "list, tokens": (listed, TokenNetwork, {}),
}
SHARDED_CASES = ("tokens", "clipped by norm", "stream of tokens")


def run_all(strategy: str | Strategy, ranks: int, names: tuple[str, ...]) -> dict[Any, Any]:
    """Gradients of every window, weights and logged losses of every case; on every rank."""
    found = {}
    for name in names:
        for count, parts in BOTH if name == "tokens" else IN_TURN:
            make, kind, arguments = CASES[name]
            loader, cut, _ = make(count, parts, ranks)
            module, logged = kind(), Logged()
            trainer = tiny_trainer(strategy=strategy, log_every_n_steps=1, callbacks=logged, **cut, **arguments)
            trainer.fit(module, loader)
            weights = torch.cat([whole(p).flatten() for p in module.parameters()])
            found[name, count, parts] = module.gradients, weights, logged.steps, logged.epoch
    return found


# --- one big batch --------------------------------------------------------------------------------------------------
def by_hand(name: str, count: int, parts: int, ranks: int) -> tuple[list[Tensor], Tensor, list[float], float]:
    """What `run_all` finds, from a plain loop over whole global batches."""
    make, kind, arguments = CASES[name]
    _, _, windows = make(count, parts, ranks)
    module, sequences = kind(), Sequences(count)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    gradients, losses, weights = [], [], []
    for indices in windows:
        batch = sequences.batch(indices)
        optimizer.zero_grad()
        loss = module.loss(batch)
        loss.backward()
        if clip := arguments.get("gradient_clip_val"):
            by_value = arguments.get("gradient_clip_algorithm") == "value"
            (nn.utils.clip_grad_value_ if by_value else nn.utils.clip_grad_norm_)(module.parameters(), clip)
        gradients.append(gradient(module))
        optimizer.step()
        losses.append(loss.item())
        weights.append(float(batch[2].sum()) if kind.per_token else float(len(indices)))
    epoch = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    return gradients, torch.cat([whole(p).flatten() for p in module.parameters()]), losses, epoch


def largest_errors(results: list[dict[Any, Any]], ranks: int) -> dict[str, float]:
    """The largest relative error of each kind over all cases, windows and ranks."""
    worst = dict.fromkeys(("gradient", "weights", "loss of a step", "loss of the epoch"), 0.0)
    for key in results[0]:
        gradients, weights, losses, epoch = by_hand(*key, ranks)
        for found in results:
            its_gradients, its_weights, its_losses, its_epoch = found[key]
            assert len(its_gradients) == len(gradients), key
            assert len(its_losses) == len(losses), key
            errors = {
                "gradient": max(relative(*pair) for pair in zip(its_gradients, gradients, strict=True)),
                "weights": relative(its_weights, weights),
                "loss of a step": max(abs(a - b) / abs(b) for a, b in zip(its_losses, losses, strict=True)),
                "loss of the epoch": abs(its_epoch - epoch) / abs(epoch),
            }
            for name, error in errors.items():
                assert error < TOLERANCE, f"{name} of {key} on {ranks} ranks: {error:.2g}"
                worst[name] = max(worst[name], error)
    return worst


def relative(found: Tensor, expected: Tensor) -> float:
    """The length of the difference, relative to that of the vector."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def show(worst: dict[str, float], strategy: str, ranks: int) -> None:
    print(f"\n{strategy} on {ranks}: largest relative errors { ({k: float(f'{v:.2g}') for k, v in worst.items()}) }")


def test_one_process_computes_the_gradient_of_one_big_batch() -> None:
    show(largest_errors([run_all("single", 1, tuple(CASES))], 1), "single", 1)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ddp_computes_the_gradient_of_one_big_batch(ranks: int) -> None:
    results = run_ranks(run_all, ranks, "ddp", ranks, tuple(CASES), timeout_seconds=120)
    show(largest_errors(list(results), ranks), "ddp", ranks)


@pytest.mark.parametrize(("strategy", "ranks"), [(FSDP(), 2), (FSDP(), 3), (HSDP(shard=2), 4)])
def test_sharded_strategies_compute_the_gradient_of_one_big_batch(strategy: Strategy, ranks: int) -> None:
    results = run_ranks(run_all, ranks, strategy, ranks, SHARDED_CASES, timeout_seconds=120)
    show(largest_errors(list(results), ranks), strategy.name, ranks)


# --- micro-batches that count for nothing -----------------------------------------------------------------------------
class Labels(pl.Module):
    """Labels of tokens, of which -1 are not to be learnt; a micro-batch may have no other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 3)
        nn.init.constant_(self.layer.weight, 0.1)
        nn.init.zeros_(self.layer.bias)

    def loss(self, batch: Any) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self.layer(inputs).flatten(0, 1), labels.flatten(), ignore_index=-1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True)
        return loss

    def loss_weight(self, batch: Any) -> Tensor:
        return (batch[1] >= 0).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def labelled() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(6, TOKENS, FEATURES, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(6 * TOKENS).reshape(6, TOKENS) % 3
    labels[2:4], labels[5, 1:] = -1, -1
    return inputs, labels


def train_labels() -> tuple[Tensor, float]:
    module, trainer = Labels(), tiny_trainer(strategy="ddp", global_batch_size=6)
    trainer.fit(module, DataLoader(TensorDataset(*labelled()), batch_size=1))
    return module.layer.weight.detach(), float(trainer.callback_metrics["loss_epoch"])


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_micro_batch_without_an_item_adds_nothing(ranks: int) -> None:
    straight = Labels()
    loss = straight.loss(labelled())
    loss.backward()
    expected = straight.layer.weight.detach() - 0.5 * straight.layer.weight.grad
    for weight, logged in run_ranks(train_labels, ranks):
        torch.testing.assert_close(weight, expected, rtol=TOLERANCE, atol=1e-7)
        assert logged == pytest.approx(loss.item(), rel=TOLERANCE)
