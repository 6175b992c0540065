"""On a GPU: batches are copied one ahead on a side stream, none is overwritten too early, and no step waits.

pytest tests/gpu                          on a machine with a CUDA device; elsewhere all of it is skipped
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import paceline as pl
from paceline.callbacks import ModelCheckpoint
from paceline.trainer.prefetch import ahead, move

from helpers.tiny import tiny_trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CLOCKS = 20_000_000  # about 10 ms of a GPU's time, for kernels that are still running when the host goes on


def on_gpu(**arguments: Any) -> pl.Trainer:
    return tiny_trainer(**{"accelerator": "gpu", "devices": 1, **arguments})


def host_batches(count: int, size: int = 1 << 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 1000, (size,), generator=generator).pin_memory() for _ in range(count)]


# --- the stream of batches --------------------------------------------------------------------------------------------
def to_gpu(batch: Any) -> Any:
    return move(batch, torch.device("cuda", 0))


def test_every_batch_arrives_once_in_order() -> None:
    batches = host_batches(7, size=10)
    arrived = list(ahead(iter(batches), to_gpu, torch.device("cuda", 0)))
    assert len(arrived) == 7
    assert all(torch.equal(there.cpu(), here) for there, here in zip(arrived, batches, strict=True))
    assert list(ahead(iter(()), to_gpu, torch.device("cuda", 0))) == []


def test_the_next_batch_is_on_its_way_before_this_one_is_trained_on() -> None:
    started = []

    def transfer(batch: Tensor) -> Tensor:
        assert torch.cuda.current_stream() != torch.cuda.default_stream()
        started.append(batch)
        return to_gpu(batch)

    stream = ahead(iter(host_batches(4, size=10)), transfer, torch.device("cuda", 0))
    seen = [len(started) for _ in stream]
    assert seen == [2, 3, 4, 4]


@pytest.mark.parametrize("keep", [False, True])
def test_a_batch_is_not_overwritten_while_kernels_still_read_it(keep: bool) -> None:
    """Each batch is let go at once, with its slow kernels still to run: its memory is given to a later batch."""
    batches = host_batches(12)
    expected = [int(batch.sum()) for batch in batches]
    sums, kept = [], []
    for batch in ahead(iter(batches), to_gpu, torch.device("cuda", 0)):
        torch.cuda._sleep(CLOCKS)
        sums.append(batch.sum())
        if keep:
            kept.append(batch)
        del batch
    assert [int(total) for total in sums] == expected


@dataclass
class Own:
    """A batch that moves itself, and of which nothing else is known."""

    data: Tensor

    def to(self, device: torch.device) -> Own:
        return Own(self.data.to(device, non_blocking=True))


def test_batches_of_any_kind_are_safe_too() -> None:
    batches = host_batches(8)
    sums = []
    for batch in ahead(iter([{"own": Own(b), "list": [b, (b,)]} for b in batches]), to_gpu, torch.device("cuda", 0)):
        torch.cuda._sleep(CLOCKS)
        sums.append(batch["own"].data.sum() + batch["list"][1][0].sum())
        del batch
    assert [int(total) for total in sums] == [2 * int(batch.sum()) for batch in batches]


# --- in a fit ---------------------------------------------------------------------------------------------------------
class Model(pl.Module):
    """A layer with all that a step may do: logs, weights of tokens, clipping."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 1)
        self.ids: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, ids = batch
        self.ids.append(ids)
        loss = F.mse_loss(self.layer(inputs).squeeze(-1), inputs.sum(-1))
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("largest", inputs.max(), on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


class Weighted(Model):
    def loss_weight(self, batch: Any) -> Tensor:
        return (batch[0] > 0).sum()


def loader(workers: int = 2, count: int = 203) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    dataset = TensorDataset(torch.randn(count, 16, generator=generator), torch.arange(count))
    return DataLoader(dataset, batch_size=8, shuffle=True, num_workers=workers, pin_memory=True)


def trained(module: Model, data: Any, **arguments: Any) -> tuple[list[list[int]], Tensor]:
    pl.seed_everything(4, verbose=False)
    on_gpu(max_epochs=2, **arguments).fit(module, data)
    return [ids.tolist() for ids in module.ids], module.layer.weight.detach().cpu()


@pytest.mark.parametrize("kind", [Model, Weighted])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_looking_ahead_changes_neither_the_samples_nor_the_weights(kind: type[Model], accumulate: int) -> None:
    ids, weights = trained(kind(), loader(workers=0), accumulate_grad_batches=accumulate)
    again, weights_again = trained(kind(), loader(workers=2), accumulate_grad_batches=accumulate)
    assert again == ids
    torch.testing.assert_close(weights_again, weights, rtol=0, atol=0)


class MovesItself(Model):
    """An overridden transfer hook is called in its place: never before the step before it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.calls.append("transfer")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls.append("step")
        return super().training_step(batch, batch_idx)


def test_an_overridden_transfer_hook_keeps_its_place() -> None:
    module = MovesItself()
    trained(module, loader(count=40))
    assert module.calls == ["transfer", "step"] * 10


# --- no step waits ----------------------------------------------------------------------------------------------------
class NoSync(pl.Callback):
    """After some steps of warming up, whatever waits for the device between two batches' ends is an error."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        busy = trainer.global_step >= 3 and not trainer.is_last_batch
        torch.cuda.set_sync_debug_mode("error" if busy else "default")

    def on_exception(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Model, {}),
        (Model, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5}),
        (Model, {"precision": "bf16-mixed", "log_every_n_steps": 2}),
        (Weighted, {"accumulate_grad_batches": 3}),
        (Model, {"global_batch_size": 20}),
    ],
    ids=["plain", "accumulated and clipped", "logged often", "token weights", "unequal parts"],
)
def test_no_step_waits_for_the_device(kind: type[Model], arguments: dict[str, Any], workers: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = on_gpu(max_epochs=2, callbacks=NoSync(), **arguments)
        trainer.fit(kind(), loader(workers))
    assert trainer.global_step > 10


# --- places in a stream -----------------------------------------------------------------------------------------------
class Lines(IterableDataset[Any]):
    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[Any]:
        while self.place < 60:
            self.place += 1
            yield torch.full((16,), self.place / 60.0), self.place - 1
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def test_the_place_in_a_stream_is_that_of_the_batch_trained_not_of_the_one_ahead(tmp_path: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def run(ckpt_path: str | None = None, **arguments: Any) -> list[list[int]]:
        module = Model()
        data = stateful.StatefulDataLoader(Lines(), batch_size=4, num_workers=1, pin_memory=True)
        on_gpu(**arguments).fit(module, data, ckpt_path=ckpt_path)
        return [ids.tolist() for ids in module.ids]

    save = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run(callbacks=save, enable_checkpointing=True)
    assert whole == [list(range(i, i + 4)) for i in range(0, 60, 4)]
    for step in (1, 7, 14):
        assert run(f"{tmp_path}/step={step}.ckpt") == whole[step:]
