"""A small model of repeated layers and what trains it, for tests of strategies that shard.

trained(steps=4)                                              # one process
run_ranks(trained_on_ranks, 2, strategy="fsdp", steps=4)      # real ranks; equal, but for the order of sums
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import paceline as pl

from helpers.tiny import tiny_trainer

WIDTH = 6


class Block(nn.Module):
    """A residual layer with a norm and two linear maps, as in a transformer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(F.gelu(self.up(self.norm(x)))))


class Layered(pl.Module):
    """Three blocks between two linear maps; `options` may ask for tied weights, frozen layers, groups, a loss."""

    def __init__(self, lr: float = 0.05, **options: Any) -> None:
        super().__init__()
        self.lr, self.options = lr, options
        torch.manual_seed(7)
        if not options.get("late"):
            self.build()

    def build(self) -> None:
        self.first = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Block(self.options.get("dropout", 0.0)) for _ in range(3))
        self.last = nn.Linear(WIDTH, 1)
        if self.options.get("tied"):
            self.again = nn.Linear(4, WIDTH, bias=False)
            self.again.weight = self.first.weight
        for name in self.options.get("frozen", ()):
            self.get_submodule(name).requires_grad_(False)

    def configure_model(self) -> None:
        if not hasattr(self, "first"):
            self.build()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.again(x) if self.options.get("tied") else self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x).mean(-1)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        if self.options.get("groups"):
            norms = [p for n, p in self.named_parameters() if "norm" in n]
            rest = [p for n, p in self.named_parameters() if "norm" not in n]
            groups = [{"params": norms, "lr": 0.1, "weight_decay": 0.0}, {"params": rest}]
            return torch.optim.AdamW(groups, lr=self.lr)
        trainable = [p for p in self.parameters() if p.requires_grad]
        if self.options.get("sgd"):
            return torch.optim.SGD(trainable, lr=self.lr, momentum=0.9)
        return torch.optim.Adam(trainable, lr=self.lr, fused=self.options.get("fused"))


def examples(count: int) -> TensorDataset:
    """The first `count` of 200 samples for `Layered`."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(200, 4, generator=generator)
    return TensorDataset(x[:count], (x.sum(1) + torch.randn(200, generator=generator))[:count])


def batches(count: int, batch_size: int) -> DataLoader[Any]:
    """A loader of `examples(count)`."""
    return DataLoader(examples(count), batch_size=batch_size)


def full_weights(module: nn.Module) -> dict[str, Tensor]:
    """All parameters by name, gathered; a collective where they are sharded."""
    return {n: whole(p) for n, p in module.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    """A plain copy of all of a tensor."""
    full = getattr(tensor, "full_tensor", None)
    return (full() if full is not None else tensor).detach().clone()


def trained(
    count: int = 16,
    batch_size: int = 4,
    model: dict[str, Any] | None = None,
    module: pl.Module | None = None,
    save: str | None = None,
    resume: str | None = None,
    val: int = 0,
    **trainer: Any,
) -> dict[str, Tensor]:
    """The weights of `Layered` after a fit; on ranks, gathered."""
    module = module or Layered(**(model or {}))
    fitter = tiny_trainer(**trainer)
    fitter.fit(module, batches(count, batch_size), batches(val, 2) if val else None, ckpt_path=resume)
    if save is not None:
        fitter.save_checkpoint(save)
    return full_weights(module)


def strategy_of(name: str | None, options: dict[str, Any]) -> Any:
    """A strategy by name, with options."""
    from paceline.strategies import DDP, FSDP, HSDP

    return {"ddp": DDP, "fsdp": FSDP, "hsdp": HSDP}[name](**options) if name else "auto"


def trained_on_ranks(strategy: str, strategy_options: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """`trained` on one rank of several, which each launcher of `run_ranks` calls."""
    return trained(strategy=strategy_of(strategy, strategy_options or {}), **arguments)
