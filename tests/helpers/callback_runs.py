"""A small module, its data and a quiet trainer, for the tests of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import paceline as pl

BATCHES = 8


class Scripted(pl.Module):
    """A linear layer; logs `train_loss` each step and, at the nth validation, the nth of `scores` as `val_score`."""

    def __init__(self, scores: Sequence[float] = (), lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["scores"])
        self.layer = torch.nn.Linear(2, 1)
        self.scores = list(scores)
        self.validations = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch[0]).pow(2).mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        score = self.scores[min(self.validations, len(self.scores) - 1)] if self.scores else float(self.validations)
        self.log("val_score", score, prog_bar=True)

    def on_validation_end(self) -> None:
        self.validations += not self.trainer.sanity_checking

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_score", 7.0)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


def loader(batches: int = BATCHES, batch_size: int = 2) -> DataLoader[Any]:
    samples = torch.arange(batches * batch_size * 2, dtype=torch.float32).reshape(-1, 2) / 10
    return DataLoader(TensorDataset(samples), batch_size=batch_size)


def trainer(root: Path | str, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """On one process, with no default callbacks but what is asked for, and no sanity check."""
    quiet: dict[str, Any] = {
        "strategy": "single",
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(root),
        "callbacks": list(callbacks),
    }
    return pl.Trainer(**(quiet | options))
