"""Saves while training goes on: what is written is the moment of the save, and errors are not lost."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import paceline as pl
from paceline.callbacks import ModelCheckpoint
from paceline.errors import CheckpointError
from paceline.strategies import SingleDevice
from paceline.trainer.checkpoint import load, storage
from paceline.trainer.checkpoint.save import prepare
from paceline.trainer.checkpoint.saver import FollowUp, Saver
from paceline.trainer.checkpoint.snapshot import Snapshot

from helpers.ranks import run_ranks
from helpers.resumable import every_save, run, same, saved_in
from helpers.tiny import Regression, loader, tiny_trainer

META = {"global_step": 1, "epoch": 0}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No write gets past it until it is set."""
    event = threading.Event()
    monkeypatch.setattr(storage, "changing", lambda kind, path: event.wait(20))
    yield event
    event.set()


def test_what_is_written_is_the_moment_of_the_save(tmp_path: Path, gate: threading.Event) -> None:
    weight, numbers = torch.ones(1000), [1, 2]
    saver = Saver(SingleDevice())
    state = {"numbers": numbers, "x": weight[:10]}
    saver.start(f"{tmp_path}/a.ckpt", prepare(model={"w": weight}, state=state, meta=META), FollowUp(), wait=False)
    weight.zero_()
    numbers.append(3)
    assert not (tmp_path / "a.ckpt").exists()
    gate.set()
    outcome = saver.settle()
    assert outcome is not None and outcome.error is None
    loaded = load(outcome.path)
    assert torch.equal(loaded.model["w"], torch.ones(1000)) and torch.equal(loaded.state["x"], torch.ones(10))
    assert loaded.state["numbers"] == [1, 2]


def test_tied_transposed_and_odd_tensors_are_copied_as_they_are() -> None:
    weight = torch.randn(3, 4)
    model = {"a": weight, "tied": weight, "t": weight.t(), "e": torch.ones(1).expand(5), "none": torch.empty(0, 2)}
    model |= {"c": torch.randn(2, dtype=torch.complex64).conj(), "half": torch.ones(3).bfloat16(), "s": torch.tensor(2)}
    copy = Snapshot().take(prepare(model=model, meta=META))
    assert copy.aliases["model"] == {"tied": "a"}
    for piece in copy.parts["model"]:
        assert torch.equal(piece.tensor, model[piece.name]) and piece.tensor.is_contiguous()
        assert piece.tensor.numel() == 0 or piece.tensor.data_ptr() != model[piece.name].data_ptr()


def test_the_memory_of_a_snapshot_is_used_again_and_bounded() -> None:
    snapshot = Snapshot()
    tensors = {str(i): torch.full((1000 + i,), float(i)) for i in range(50)}
    first = {p.name: p.tensor.data_ptr() for p in snapshot.take(prepare(model=tensors, meta=META)).parts["model"]}
    again = snapshot.take(prepare(model=tensors, meta=META)).parts["model"]
    assert {p.name: p.tensor.data_ptr() for p in again} == first
    assert all(torch.equal(piece.tensor, tensors[piece.name]) for piece in again)
    snapshot.take(prepare(model={"one": torch.ones(1)}, meta=META))
    assert sum(map(len, snapshot._chunks[False])) == 2**28


def test_training_goes_on_while_a_save_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    writing = threading.Event()

    class Watches(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            steps.append(trainer.global_step)
            if len(steps) == 6:
                writing.set()

    def slow(kind: str, path: str) -> None:
        if threading.current_thread().name == "checkpoint-writer" and kind == "create":
            assert writing.wait(20), "training waited for the writer"

    monkeypatch.setattr(storage, "changing", slow)
    saves = ModelCheckpoint(every_n_train_steps=3, save_top_k=-1)
    outcome = run("sgd_momentum_by_step", tmp_path, callbacks=(saves, Watches()), max_steps=7)
    assert steps == list(range(1, 8)) and outcome.step == 7
    assert [Path(path).name for path in saved_in(tmp_path)] == ["epoch=0-step=3.ckpt", "epoch=0-step=6.ckpt"]


class Large(Regression):
    """72 MB with Adam's averages."""

    def __init__(self) -> None:
        super().__init__(torch.optim.Adam)
        self.weight = torch.nn.Parameter(torch.zeros(6_000_000))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + self.weight.sum()


@pytest.mark.parametrize("async_save", [True, False])
def test_the_memory_of_the_first_save_is_taken_as_training_begins(async_save: bool) -> None:
    held: dict[str, set[int]] = {}

    class Watches(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.saver._join()
            self.look("before", trainer)

        def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.look("after", trainer)

        def look(self, when: str, trainer: pl.Trainer) -> None:
            snapshot = trainer.saver._snapshot
            held[when] = {chunk.data_ptr() for chunk in snapshot._chunks[False]} if snapshot else set()

    callbacks = [Watches(), ModelCheckpoint(every_n_train_steps=1, async_save=async_save)]
    tiny_trainer(max_steps=1, callbacks=callbacks, enable_checkpointing=True).fit(Large(), loader(2))
    assert held["before"] == held["after"]
    assert len(held["after"]) == async_save


def failing(after: int, then_ok: bool = False) -> Callable[[str, str], None]:
    """The disk is full when the writer makes its nth file, and all later ones unless `then_ok`."""
    made = 0

    def changing(kind: str, path: str) -> None:
        nonlocal made
        made += kind == "create" and ".tmp-" in path
        if kind == "create" and (made == after or (made > after and not then_ok)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    return changing


@pytest.mark.parametrize("async_save", [True, False])
def test_a_full_disk_stops_training_and_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool
) -> None:
    monkeypatch.setattr(storage, "changing", failing(after=9))
    saves = ModelCheckpoint(every_n_train_steps=2, async_save=async_save)
    with pytest.raises(CheckpointError, match=r"step=4.ckpt could not be saved: No space left on device"):
        run("sgd_momentum_by_step", tmp_path, callbacks=(saves,))
    assert [Path(path).name for path in saved_in(tmp_path)] == ["epoch=0-step=2.ckpt"]
    assert saves.best_model_path == saved_in(tmp_path)[0] and load(saves.best_model_path).meta["global_step"] == 2


@pytest.mark.parametrize(("then_ok", "newest"), [(True, "epoch=2-step=26.ckpt"), (False, "epoch=0-step=2.ckpt")])
def test_training_goes_on_without_a_save_where_that_was_asked_for(
    then_ok: bool, newest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("sgd_momentum_by_step", tmp_path / "whole")
    monkeypatch.setattr(storage, "changing", failing(after=9, then_ok=then_ok))
    saves = ModelCheckpoint(every_n_train_steps=2, save_last=True, on_save_error="warn")
    with pytest.warns(UserWarning, match="No space left on device.* Training goes on"):
        outcome = run("sgd_momentum_by_step", tmp_path / "runs", callbacks=(saves,))
    assert outcome.digests == whole.digests
    assert [Path(path).name for path in saved_in(tmp_path / "runs")] == [newest]
    assert Path(load(saves.last_model_path).path).name == newest


def full_disk(root: Path) -> str:
    before, storage.changing = storage.changing, failing(after=9)
    try:
        run("sgd_momentum_by_step", root, callbacks=(ModelCheckpoint(every_n_train_steps=2),), ranks=2)
    except CheckpointError as error:
        return str(error)
    finally:
        storage.changing = before  # the rank goes on to other tests
    return ""


def test_a_failed_save_is_an_error_on_every_rank_with_the_rank_that_failed(tmp_path: Path) -> None:
    told = run_ranks(full_disk, 2, tmp_path)
    assert told[0] == told[1] and told[0].startswith("rank 0: ") and "No space left on device" in told[0]


def test_nothing_valid_is_removed_before_its_successor_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[int] = []

    def changing(kind: str, path: str) -> None:
        if "checkpoints" in path:
            found = [path for path in saved_in(tmp_path) if ".tmp-" not in path]
            whole.append(len(found))

    monkeypatch.setattr(storage, "changing", changing)
    run("sgd_momentum_by_step", tmp_path, callbacks=(ModelCheckpoint(every_n_train_steps=1, save_last=True),))
    first = whole.index(1)
    assert min(whole[first:]) == 1


def test_the_last_save_is_whole_when_an_exception_leaves_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Raises(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                raise RuntimeError("stop here")

    monkeypatch.setattr(storage, "changing", lambda kind, path: time.sleep(0.005))
    with pytest.raises(RuntimeError, match="stop here"):
        run("sgd_momentum_by_step", tmp_path, callbacks=(ModelCheckpoint(every_n_train_steps=4), Raises()))
    assert [Path(path).name for path in saved_in(tmp_path)] == ["epoch=0-step=4.ckpt"]
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint-writer"]


def test_saving_asynchronously_or_not_makes_the_same_checkpoints(tmp_path: Path) -> None:
    runs = {}
    for name, async_save in (("async", True), ("sync", False)):
        callbacks = every_save()
        for callback in callbacks:
            callback.async_save = async_save  # type: ignore[attr-defined]
        runs[name] = run("adam_plateau_accumulated", tmp_path / name, callbacks=callbacks)
    same(runs["async"], runs["sync"])
    names = [[Path(path).name for path in saved_in(tmp_path / name)] for name in runs]
    assert names[0] == names[1]
    for name in names[0]:
        one, other = (load(tmp_path / kind / "version_0/checkpoints" / name) for kind in runs)
        torch.testing.assert_close(one.model, other.model, rtol=0, atol=0)
        assert one.state["loops"] == other.state["loops"]
