"""Checkpoints between strategies and numbers of ranks: saved by one, continued by another, optimizer included."""

from __future__ import annotations

import errno
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import paceline as pl
from paceline.trainer.checkpoint import load, storage, verify
from paceline.trainer.checkpoint.exchange import consolidate
from paceline.trainer.checkpoint.inspect import differences

from helpers.ranks import RanksFailed, run_ranks
from helpers.sharded import Layered, batches, full_weights, strategy_of, trained, trained_on_ranks
from helpers.tiny import assert_same, tiny_trainer

JOBS: dict[str, tuple[int, str | None, dict[str, Any]]] = {
    "single": (1, None, {}),
    "ddp 2": (2, "ddp", {}),
    "fsdp 2": (2, "fsdp", {}),
    "fsdp 3": (3, "fsdp", {}),
    "fsdp 4": (4, "fsdp", {}),
    "hsdp 2x2": (4, "hsdp", {"shard": 2}),
}
WINDOWS = {"count": 24, "batch_size": 2, "global_batch_size": 12}
TOLERANCE = 2e-6


def run(job: str, **arguments: Any) -> Any:
    """The weights that rank 0 of the job ends with."""
    ranks, strategy, options = JOBS[job]
    arguments = WINDOWS | {"model": {"groups": True}} | arguments
    if strategy is None:
        return trained(**arguments)
    results = run_ranks(trained_on_ranks, ranks, strategy, options, **arguments)
    for weights in results:
        assert_same(weights, results[0])
    return results[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A checkpoint after one of two epochs, by every job."""
    folder = tmp_path_factory.mktemp("saved")
    paths = {job: str(folder / f"{job.replace(' ', '-')}.ckpt") for job in JOBS}
    for job, path in paths.items():
        run(job, max_epochs=1, save=path)
    return paths


@pytest.mark.parametrize("job", JOBS)
def test_a_checkpoint_is_whole_and_holds_the_weights_and_states_of_one_process(job: str, saved: dict[str, str]) -> None:
    assert verify(saved[job]) == []
    found, expected = load(saved[job]), load(saved["single"])
    assert found.model.keys() == expected.model.keys()
    assert_same(found.model, expected.model, TOLERANCE)
    assert found.optimizer[0]["groups"] == expected.optimizer[0]["groups"]
    for name, state in expected.optimizer[0]["state"].items():
        assert_same(found.optimizer[0]["state"][name], state, TOLERANCE)


@pytest.mark.parametrize("job", ["fsdp 2", "fsdp 3", "hsdp 2x2"])
def test_each_rank_writes_its_boxes_and_opens_with_safetensors(job: str, saved: dict[str, str]) -> None:
    files = sorted(path.name for path in Path(saved[job]).glob("model*"))
    writers = 2 if job != "fsdp 3" else 3
    assert files == [f"model-r{rank:05}-of-{JOBS[job][0]:05}.safetensors" for rank in range(writers)]
    numbers = [sum(t.numel() for t in load_file(Path(saved[job], name)).values()) for name in files]
    assert sum(numbers) == 559
    assert max(numbers) < 559


@pytest.mark.parametrize("job", ["fsdp 3", "hsdp 2x2"])
def test_consolidated_shards_hold_the_same_in_whole_files(job: str, saved: dict[str, str], tmp_path: Path) -> None:
    whole = consolidate(saved[job], tmp_path / "whole")
    assert differences(saved[job], whole) == [] and verify(whole) == []
    assert sum(tensor.numel() for tensor in load_file(Path(whole, "model.safetensors")).values()) == 559


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(a, b, marks=[] if "fsdp 3" in (a, b) or (a, b) == ("ddp 2", "hsdp 2x2") else pytest.mark.slow)
        for a, b in product(JOBS, JOBS)
    ],
)
def test_a_run_goes_on_under_any_other_strategy(source: str, target: str, saved: dict[str, str]) -> None:
    straight = trained(**WINDOWS | {"model": {"groups": True}}, max_epochs=2)
    assert_same(run(target, max_epochs=2, resume=saved[source]), straight, TOLERANCE)


@pytest.mark.parametrize("job", ["fsdp 2", "fsdp 3", "hsdp 2x2"])
def test_resuming_on_the_same_ranks_is_exact_to_the_bit(job: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": {"dropout": 0.3}, "accumulate_grad_batches": 2, "global_batch_size": None}
    straight = run(job, max_steps=5, max_epochs=9, **options)
    path = str(tmp_path / "middle.ckpt")
    run(job, max_steps=3, max_epochs=9, save=path, **options)
    assert_same(run(job, max_steps=5, max_epochs=9, resume=path, **options), straight)


def resaved(path: str, again: str) -> None:
    module = Layered(tied=True)
    trainer = tiny_trainer(strategy="fsdp")
    trainer.fit(module, batches(8, 2))
    trainer.save_checkpoint(path)
    other = Layered(tied=True)
    trainer = tiny_trainer(strategy="fsdp", max_epochs=1)
    trainer.fit(other, batches(8, 2), ckpt_path=path)
    assert_same(full_weights(other), full_weights(module))
    trainer.save_checkpoint(again)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    run_ranks(resaved, 3, str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt"))
    for name in ("a", "b"):
        index = json.loads((tmp_path / f"{name}.ckpt" / "index-r00000-of-00003.json").read_text())
        assert index["parts"]["model"]["again.weight"] == {"alias": "first.weight"}
    model = load(tmp_path / "a.ckpt").model
    assert model["again.weight"] is model["first.weight"]


def saves_in_the_background(folder: str) -> list[str]:
    callback = pl.callbacks.ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1)
    tiny_trainer(strategy="fsdp", callbacks=callback, enable_checkpointing=True).fit(Layered(), batches(12, 2))
    return sorted(path.name for path in Path(folder).glob("*.ckpt"))


def test_checkpoint_callbacks_save_shards_while_training_goes_on(tmp_path: Path) -> None:
    names = run_ranks(saves_in_the_background, 2, str(tmp_path))[0]
    assert len(names) >= 3
    for name in names:
        assert verify(tmp_path / name) == []


def fails_to_save(folder: str, rank: int, name: str, error: Exception) -> str:
    """Saves, and saves again with a write of one rank failing: of the file whose name begins like this."""
    trainer = tiny_trainer(strategy="fsdp")
    trainer.fit(Layered(), batches(8, 2))
    trainer.save_checkpoint(f"{folder}/older.ckpt")
    before = storage.changing

    def changing(kind: str, path: str) -> None:
        if trainer.global_rank == rank and path.rpartition("/")[2].startswith(name):
            raise error

    storage.changing = changing
    try:
        trainer.save_checkpoint(f"{folder}/x.ckpt")
    except pl.CheckpointError as refusal:
        return str(refusal)
    finally:
        storage.changing = before  # the rank goes on to other tests
    return ""


@pytest.mark.parametrize(
    ("rank", "name", "error"),
    [
        (0, "index", OSError(errno.ENOSPC, "No space left on device")),
        (1, "index", OSError(errno.ENOSPC, "No space left on device")),
        (2, "model", RuntimeError("of some library")),
        (0, "manifest", PermissionError(errno.EACCES, "Permission denied")),
    ],
)
def test_a_save_that_fails_on_any_rank_is_an_error_on_every_rank(
    rank: int, name: str, error: Exception, tmp_path: Path
) -> None:
    told = run_ranks(fails_to_save, 3, str(tmp_path), rank, name, error)
    assert len(set(told)) == 1 and f"x.ckpt could not be saved: rank {rank}: " in told[0]
    assert str(error.args[-1]) in told[0]
    assert [path.name for path in tmp_path.iterdir()] == ["older.ckpt"] and verify(tmp_path / "older.ckpt") == []


class OddOnOneRank(pl.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"odd": {1, 2} if pl.rank_zero_only.rank else [1, 2]}


def keeps_what_cannot_be_stored(path: str) -> str:
    trainer = tiny_trainer(strategy="fsdp", callbacks=OddOnOneRank())
    trainer.fit(Layered(), batches(8, 2))
    with pytest.raises(pl.CheckpointError) as refusal:
        trainer.save_checkpoint(path)
    return str(refusal.value)


def test_state_of_one_rank_that_cannot_be_stored_is_refused_on_every_rank(tmp_path: Path) -> None:
    told = run_ranks(keeps_what_cannot_be_stored, 2, str(tmp_path / "x.ckpt"))
    assert told[0] == told[1] and "callbacks.OddOnOneRank.odd is of type set" in told[0]
    assert list(tmp_path.iterdir()) == []


def averaged(strategy: str | None, batch_size: int, save: str | None = None, resume: str | None = None) -> Any:
    callback = pl.callbacks.EMAWeightAveraging(decay=0.5)
    return trained(
        16, batch_size, {"sgd": True}, strategy=strategy_of(strategy, {}), callbacks=callback, global_batch_size=8,
        max_epochs=2 if resume else 1, save=save, resume=resume,
    )  # fmt: skip


def test_averaged_weights_are_those_of_one_process_and_move_too(tmp_path: Path) -> None:
    one, two = str(tmp_path / "one.ckpt"), str(tmp_path / "two.ckpt")
    straight = averaged(None, 8, save=one)
    assert_same(run_ranks(averaged, 2, "fsdp", 2, save=two)[0], straight, TOLERANCE)
    expected = averaged(None, 8, resume=one)
    assert_same(run_ranks(averaged, 3, "fsdp", 2, resume=two)[0], expected, TOLERANCE)
    assert_same(averaged(None, 8, resume=two), expected, TOLERANCE)
    assert torch.is_tensor(load(two).model["first.weight"])


# --- state of other shapes than the parameters' -----------------------------------------------------------------------
class Factored(torch.optim.Optimizer):
    """As Adafactor: of a matrix it keeps the mean squares of rows and columns."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.02})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            squares, state = p.grad.square() + 1e-12, self.state[p]
            over = {"rows": -1, "columns": 0} if p.dim() == 2 and p.shape[0] > 1 else {"all": ()}
            for key, dim in over.items():
                mean = squares.mean(dim) if dim != () else squares
                state.setdefault(key, torch.zeros_like(mean)).mul_(0.9).add_(mean, alpha=0.1)
            if "all" in state:
                p.sub_(0.02 * p.grad / state["all"].sqrt())
            else:
                scale = state["rows"][:, None] * state["columns"][None] / state["rows"].mean()
                p.sub_(0.02 * p.grad / scale.sqrt())


class Local(torch.optim.SGD):
    """Keeps state of its own shard only."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["seen"] = p.grad.to_local().abs()


class Optimized(Layered):
    def __init__(self, kind: type[torch.optim.Optimizer]) -> None:
        super().__init__()
        self.kind = kind

    def configure_optimizers(self) -> Any:
        return self.kind(self.parameters())


def trained_by(kind: type[torch.optim.Optimizer], strategy: str | None, batch_size: int, **arguments: Any) -> Any:
    return trained(24, batch_size, module=Optimized(kind), strategy=strategy_of(strategy, {}), **arguments)


def test_statistics_of_rows_and_columns_move_between_numbers_of_ranks(tmp_path: Path) -> None:
    one, two = str(tmp_path / "one.ckpt"), str(tmp_path / "two.ckpt")
    trained_by(Factored, None, 12, max_epochs=1, save=one)
    run_ranks(trained_by, 2, Factored, "fsdp", 6, max_epochs=1, save=two)
    straight = trained_by(Factored, None, 12, max_epochs=2)
    assert_same(trained_by(Factored, None, 12, max_epochs=2, resume=two), straight, TOLERANCE)
    for path, ranks in ((one, 2), (two, 3)):
        found = run_ranks(trained_by, ranks, Factored, "fsdp", 12 // ranks, max_epochs=2, resume=path)
        assert_same(found[0], straight, TOLERANCE)


def test_state_that_each_rank_keeps_for_itself_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(trained_by, 2, Local, "fsdp", 6, save=str(tmp_path / "x.ckpt"))
    for error in failed.value.errors.values():
        assert error.message.startswith(
            "Local keeps 'seen' of 'first.weight' as a tensor of shape [3, 4] of each rank's"
        )
