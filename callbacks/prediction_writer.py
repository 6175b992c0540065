"""`PredictionWriter`: the base of callbacks that write predictions, batch by batch or all at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import ConfigurationError
from ..trainer.callback import Callback
from ..trainer.prefetch import move

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..trainer.module import Module
    from ..trainer.trainer import Trainer

_INTERVALS = ("batch", "epoch", "batch_and_epoch")
_CPU = torch.device("cpu")


class PredictionWriter(Callback):
    """Override `write_on_batch_end`, `write_on_epoch_end` or both, and say so with `write_interval`.

    Each rank is given its own batches: write to a file for each rank (`trainer.global_rank`), or gather first. With
    `trainer.predict(return_predictions=False)` only what this callback was asked to write is kept.
    """

    def __init__(self, write_interval: Literal["batch", "epoch", "batch_and_epoch"] = "batch") -> None:
        if write_interval not in _INTERVALS:
            raise ConfigurationError(f"write_interval={write_interval!r}: use one of {', '.join(_INTERVALS)}.")
        self.write_interval = str(getattr(write_interval, "value", write_interval))
        self._on_batch = self.write_interval != "epoch"
        self._on_epoch = self.write_interval != "batch"
        self._predictions: list[list[Any]] = []
        self._indices: list[list[Sequence[Any] | None]] = []

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        prediction: Any,
        batch_indices: Sequence[Any] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write what `predict_step` returned for a batch.

        `batch_indices` are the places of its samples in the data set; None where the loader is no map-style DataLoader.
        """
        raise NotImplementedError("write_on_batch_end is not defined")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: Module, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write all predictions of this rank, on the CPU: one a batch, in a list for each loader if there are several.

        `batch_indices` has a list for each loader, also for a single one.
        """
        raise NotImplementedError("write_on_epoch_end is not defined")

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        wanted = {"write_on_batch_end": self._on_batch, "write_on_epoch_end": self._on_epoch}
        for name in (name for name, needed in wanted.items() if needed and stage == "predict"):
            if getattr(type(self), name) is getattr(PredictionWriter, name):
                raise ConfigurationError(
                    f"{type(self).__name__} has write_interval={self.write_interval!r} and no {name}. Define it, or "
                    "use another write_interval."
                )

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._predictions = [[] for _ in trainer.num_predict_batches]
        self._indices = [[] for _ in trainer.num_predict_batches]

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        indices = _indices_of(trainer)
        if self._on_batch:
            self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)
        if self._on_epoch:
            self._predictions[dataloader_idx].append(move(outputs, _CPU))
            self._indices[dataloader_idx].append(indices)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if not self._on_epoch:
            return
        predictions = self._predictions[0] if len(self._predictions) == 1 else self._predictions
        self.write_on_epoch_end(trainer, pl_module, predictions, self._indices)
        self._predictions, self._indices = [], []


def _indices_of(trainer: Trainer) -> Sequence[Any] | None:
    """The places in the data set of the samples of the batch under way."""
    indices = None if trainer.evaluation is None else trainer.evaluation.indices
    if indices is None:
        return None
    return list(indices) if isinstance(indices, (list, tuple, range)) else [indices]
