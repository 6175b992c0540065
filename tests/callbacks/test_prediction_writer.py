"""`PredictionWriter`: what its methods are given, on one rank and on two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from paceline.callbacks import BasePredictionWriter, PredictionWriter
from paceline.errors import ConfigurationError

from helpers.ranks import run_ranks
from helpers.tiny import Numbers, Regression, numbers, tiny_trainer


class Doubling(Regression):
    """Predicts twice the number, so that predictions tell which samples they belong to."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch * 2


class Writer(PredictionWriter):
    def __init__(self, write_interval: Any) -> None:
        super().__init__(write_interval)
        self.batches: list[Any] = []
        self.epochs: list[Any] = []

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert torch.equal(torch.as_tensor(prediction), torch.as_tensor(batch * 2))
        self.batches.append((torch.as_tensor(prediction).tolist(), batch_indices, batch_idx, dataloader_idx))

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.epochs.append((tolists(predictions), batch_indices))


def tolists(predictions: Any) -> Any:
    return [p.tolist() if isinstance(p, torch.Tensor) else tolists(p) for p in predictions]


@pytest.mark.parametrize("interval", ["batch", "epoch", "batch_and_epoch"])
@pytest.mark.parametrize("keep", [True, False])
def test_one_loader(interval: str, keep: bool) -> None:
    writer = Writer(interval)
    returned = tiny_trainer(callbacks=[writer]).predict(Doubling(), numbers(5), return_predictions=keep)
    batches = [([0, 2], [0, 1], 0, 0), ([4, 6], [2, 3], 1, 0), ([8], [4], 2, 0)]
    assert writer.batches == (batches if interval != "epoch" else [])
    epochs = [([[0, 2], [4, 6], [8]], [[[0, 1], [2, 3], [4]]])]
    assert writer.epochs == (epochs if interval != "batch" else [])
    assert (returned is not None) == keep


def test_several_loaders_have_lists_of_their_own() -> None:
    writer = Writer("batch_and_epoch")
    tiny_trainer(callbacks=[writer]).predict(Doubling(), [numbers(2), numbers(3)])
    assert writer.epochs == [([[[0, 2]], [[0, 2], [4]]], [[[0, 1]], [[0, 1], [2]]])]
    assert [(index, loader) for _, _, index, loader in writer.batches] == [(0, 0), (0, 1), (1, 1)]


def test_indices_are_those_of_the_data_set_whatever_the_sampler() -> None:
    loaders = {
        "shuffled": numbers(6, shuffle=True),
        "batch sampler": DataLoader(Numbers(6), batch_sampler=BatchSampler(SequentialSampler(range(6)), 4, False)),
        "single samples": numbers(3, batch_size=None),
    }
    for loader in loaders.values():
        writer = Writer("batch")
        tiny_trainer(callbacks=[writer]).predict(Doubling(), loader)
        for prediction, indices, _, _ in writer.batches:
            assert [2 * i for i in indices] == (prediction if isinstance(prediction, list) else [prediction])
    writer = Writer("batch")
    tiny_trainer(callbacks=[writer]).predict(Doubling(), list(numbers(4)))
    assert [indices for _, indices, _, _ in writer.batches] == [None, None]


def test_a_second_call_begins_anew_and_other_calls_write_nothing() -> None:
    writer = Writer("epoch")
    trainer = tiny_trainer(callbacks=[writer])
    for _ in range(2):
        trainer.predict(Doubling(), numbers(2))
    assert writer.epochs == [([[0, 2]], [[[0, 1]]])] * 2


def test_misuse_is_refused_before_the_first_batch() -> None:
    assert BasePredictionWriter is PredictionWriter
    with pytest.raises(ConfigurationError, match="batch_and_epoch"):
        PredictionWriter("step")  # type: ignore[arg-type]
    needed: Any = {"batch": "write_on_batch_end", "epoch": "write_on_epoch_end"}
    for interval, missing in needed.items():
        with pytest.raises(ConfigurationError, match=f"no {missing}"):
            tiny_trainer(callbacks=[PredictionWriter(interval)]).predict(Doubling(), numbers(2))


def writes_on_a_rank() -> Any:
    writer = Writer("batch_and_epoch")
    trainer = tiny_trainer(callbacks=[writer], strategy="ddp", devices=2)
    trainer.predict(Doubling(), numbers(5))
    return writer.batches, writer.epochs


def test_each_rank_writes_its_own_batches() -> None:
    (first, first_epoch), (second, second_epoch) = run_ranks(writes_on_a_rank, 2)
    assert first == [([0, 2], [0, 1], 0, 0), ([8], [4], 2, 0)]
    assert second == [([4, 6], [2, 3], 1, 0)]
    assert first_epoch == [([[0, 2], [8]], [[[0, 1], [4]]])]
    assert second_epoch == [([[4, 6]], [[[2, 3]]])]
