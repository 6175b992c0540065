"""Models, data and trainers so small that a test's whole run takes milliseconds.

    module = Regression()
    tiny_trainer(max_epochs=2).fit(module, loader(8))
    assert_same(module, by_hand(8, epochs=2))

Everything is a function of its arguments: no test depends on what another one drew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import paceline as pl

FEATURES = 3
MOST_SAMPLES = 128


class Regression(pl.Module):
    """Least squares from three numbers to one; `make_optimizer` gets the parameters."""

    def __init__(self, make_optimizer: Any = None, lr: float = 0.1) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=lr))
        self.layer = nn.Linear(FEATURES, 1)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.5, -0.25, 1.0]]))
            self.layer.bias.fill_(0.125)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs).squeeze(-1)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return F.mse_loss(self(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Sums(pl.Module):
    """A module without parameters worth training: for tests of data, hooks and metrics. `seen` are the samples read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append([int(number) for number in torch.as_tensor(batch).reshape(-1)])
        return self.weight * 1.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Numbers(Dataset[int]):
    """The numbers 0, 1, 2, ..., each as its own sample."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def samples(count: int) -> TensorDataset:
    """The first `count` samples for `Regression`."""
    generator = torch.Generator().manual_seed(1234)
    inputs = torch.randn(MOST_SAMPLES, FEATURES, generator=generator)
    targets = inputs.sum(dim=1) + torch.randn(MOST_SAMPLES, generator=generator)
    return TensorDataset(inputs[:count], targets[:count])


def loader(count: int, batch_size: int = 2, shuffle: bool = False, **options: Any) -> DataLoader[Any]:
    """A loader of `samples(count)`."""
    return DataLoader(samples(count), batch_size=batch_size, shuffle=shuffle, **options)


def numbers(count: int, batch_size: int | None = 2, **options: Any) -> DataLoader[Any]:
    """A loader of `Numbers(count)`."""
    return DataLoader(Numbers(count), batch_size=batch_size, **options)


def tiny_trainer(**arguments: Any) -> pl.Trainer:
    """A trainer that neither prints nor writes; on the CPU, for one epoch, if not told otherwise."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    if not {"max_epochs", "max_steps", "max_time", "fast_dev_run"} & arguments.keys():
        quiet["max_epochs"] = 1
    return pl.Trainer(**quiet | arguments)


def global_batches(count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """The samples in order, cut into batches of `size`; the last may be short."""
    inputs, targets = samples(count).tensors
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def by_hand(
    batches: Iterable[tuple[Tensor, Tensor]],
    make_optimizer: Any = None,
    clip_norm: float = 0.0,
    clip_value: float = 0.0,
) -> Regression:
    """`Regression` after one hand-written step for each of `batches`: what every strategy must arrive at."""
    module = Regression(make_optimizer)
    optimizer = module.configure_optimizers()
    for batch in batches:
        optimizer.zero_grad()
        module.loss(batch).backward()
        if clip_norm:
            nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
        if clip_value:
            nn.utils.clip_grad_value_(module.parameters(), clip_value)
        optimizer.step()
    return module


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, copied."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_same(left: Any, right: Any, tolerance: float = 0.0) -> None:
    """Two modules, or dicts of tensors, hold the same values."""
    left, right = (weights(item) if isinstance(item, nn.Module) else item for item in (left, right))
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def adam(parameters: Any) -> torch.optim.Optimizer:
    """For `make_optimizer`: unlike SGD it does not forgive a gradient that is scaled wrongly in some steps."""
    return torch.optim.Adam(parameters, lr=0.05)
