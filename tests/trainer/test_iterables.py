"""Data without indices: every item to one worker of one rank, ranks that end together, and resuming at the very place.

torchdata's StatefulDataLoader is the real one. What a resumed run reads, draws and computes is compared to the bit with
the run that was never interrupted.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import paceline as pl
from paceline.callbacks import ModelCheckpoint
from paceline.errors import ConfigurationError
from paceline.trainer.iterables import length_of_stream, sharded

from helpers.ranks import RanksFailed, run_ranks
from helpers.tiny import assert_same, tiny_trainer

COUNT = 23


class Draws(pl.Module):
    """Notes what it reads; its weight depends on all of it, and on what is drawn in between."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.ids: list[list[int]] = []
        self.kept_up = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.metrics.muted:
            self.kept_up += 1
        else:
            self.ids.append([int(i) for i in batch.reshape(-1)])
        self.log("mean", batch.double().mean(), on_step=True, on_epoch=True)
        return self.weight * (batch.double().mean() + torch.rand(()))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Stream(IterableDataset[int]):
    """0, 1, 2, ..."""

    def __init__(self, count: int = COUNT) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))


class Sized(Stream):
    def __len__(self) -> int:
        return self.count


class ByWorker(Stream):
    """Asks for its worker, so it deals to workers itself; ranks are for the trainer."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter(range(first, self.count, step))


class ByRank(Stream):
    """Rank r has 3 batches of two and 2 r more; workers are for the trainer."""

    def __init__(self, rank: int) -> None:
        super().__init__(6 + 4 * rank)
        self.rank = rank

    def __iter__(self) -> Iterator[int]:
        return iter(range(100 * self.rank, 100 * self.rank + self.count))


class Shuffles(Stream):
    """In another order each time, drawn as it begins."""

    def __iter__(self) -> Iterator[int]:
        yield from random.sample(range(self.count), self.count)


class ShufflesByWorker(ByWorker):
    def __iter__(self) -> Iterator[int]:
        items = torch.tensor(list(super().__iter__()))
        return iter(items[torch.randperm(len(items))].tolist())


STREAMS: dict[str, type[Stream]] = {
    "no length": Stream,
    "sized": Sized,
    "deals to workers itself": ByWorker,
    "shuffles itself": Shuffles,
    "shuffles itself for a worker": ShufflesByWorker,
}


# --- dealing ----------------------------------------------------------------------------------------------------------
def read_all(workers: int) -> Any:
    """What this rank trains and validates of each stream in an epoch."""
    found: dict[str, Any] = {}
    for name, kind in STREAMS.items():
        module, trainer = Draws(), tiny_trainer(strategy="ddp")
        trainer.fit(module, DataLoader(kind(), batch_size=2, num_workers=workers))
        found[name] = (
            module.ids,
            trainer.num_training_batches,
            trainer.fit_run.progress.total_batches,
            evaluate(kind, workers),
        )
    return found


def evaluate(kind: type[Stream], workers: int) -> list[int]:
    class Predicts(Draws):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            self.ids.append(batch.tolist())

    module = Predicts()
    trainer = tiny_trainer(strategy="ddp")
    trainer.predict(module, DataLoader(kind(), batch_size=2, num_workers=workers))
    return [i for batch in module.ids for i in batch]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_item_goes_to_one_worker_of_one_rank(ranks: int, workers: int) -> None:
    results = run_ranks(read_all, ranks, workers)
    for name in STREAMS:
        trained = [i for rank in results for batch in rank[name][0] for i in batch]
        evaluated = [i for rank in results for i in rank[name][3]]
        assert sorted(trained) == sorted(evaluated) == list(range(COUNT)), name
        run = {rank[name][2] for rank in results}
        assert len(run) == 1, "ranks run as many micro-batches"
        known = results[0][name][1]
        assert known == (run.pop() if name == "sized" else float("inf")), name


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_number_of_batches_of_a_sized_stream_is_known_for_any_ranks_and_workers(
    batch_size: int, drop_last: bool
) -> None:
    for ranks in (1, 2, 3):
        for workers in (0, 1, 2, 4):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # more workers than processors
                loader = DataLoader(Sized(), batch_size, num_workers=workers, drop_last=drop_last)
            counts = []
            for rank in range(ranks):
                share = sharded(loader, rank, ranks)
                counts.append(count_batches(share.dataset, rank, ranks, workers, batch_size, drop_last))
            assert length_of_stream(share) == max(counts), (ranks, workers)
            assert length_of_stream(share, drop_last_rank=True) == min(counts), (ranks, workers)


def count_batches(dataset: Any, rank: int, ranks: int, workers: int, size: int, drop_last: bool) -> int:
    """How many batches torch would make: each worker its own, of the items that fall to it."""
    shards = max(workers, 1)
    items = [len(range(rank * shards + worker, COUNT, ranks * shards)) for worker in range(shards)]
    return sum(n // size if drop_last else -(-n // size) for n in items)


def windows_of_stream(accumulate: int) -> list[list[list[int]]]:
    module = Draws()
    trainer = tiny_trainer(strategy="ddp", accumulate_grad_batches=accumulate)
    trainer.fit(module, DataLoader(Stream(), batch_size=2))
    return [module.ids[i : i + accumulate] for i in range(0, len(module.ids), accumulate)]


def test_without_workers_a_window_has_the_same_items_on_any_number_of_ranks() -> None:
    expected = [list(range(start, min(start + 12, COUNT))) for start in range(0, COUNT, 12)]
    for ranks in (1, 2, 3):
        results = run_ranks(windows_of_stream, ranks, 6 // ranks)
        windows = zip(*results, strict=True)
        assert [sorted(i for rank in window for batch in rank for i in batch) for window in windows] == expected


def fit_by_rank(accumulate: int, drop_last: bool) -> Any:
    class Steps(pl.Callback):
        def __init__(self) -> None:
            self.means: list[float] = []

        def on_log(self, trainer: Any, pl_module: Any, metrics: dict[str, float], step: int) -> None:
            if "mean_step" in metrics:
                self.means.append(metrics["mean_step"])

    steps = Steps()
    trainer = tiny_trainer(
        strategy="ddp", accumulate_grad_batches=accumulate, log_every_n_steps=1, callbacks=steps, max_epochs=1
    )
    module = Draws()
    trainer.fit(module, DataLoader(ByRank(trainer.global_rank), batch_size=2, drop_last=drop_last))
    return module.ids, module.kept_up, steps.means, trainer.samples_seen


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_streams_of_unequal_lengths_end_together_and_every_batch_weighs_its_items(
    accumulate: int, drop_last: bool
) -> None:
    results = run_ranks(fit_by_rank, 3, accumulate, drop_last)
    batches = [[[100 * rank + i, 100 * rank + i + 1] for i in range(0, 6 + 4 * rank, 2)] for rank in range(3)]
    kept = [rank[: 3 if drop_last else None] for rank in batches]
    most = max(map(len, kept))
    for rank, (ids, kept_up, _, samples) in enumerate(results):
        assert ids == kept[rank]
        assert kept_up == most - len(kept[rank])
        assert samples == sum(len(batch) for share in kept for batch in share)
    windows = [
        [i for share in kept for batch in share[w : w + accumulate] for i in batch] for w in range(0, most, accumulate)
    ]
    expected = [sum(window) / len(window) for window in windows]
    assert all(means == pytest.approx(expected, rel=1e-9) for _, _, means, _ in results)


class Normed(Draws):
    """Notes the batch statistics after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1, momentum=None)
        self.means: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + 0 * self.norm(batch.float()[:, None]).sum()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.means.append(self.norm.running_mean.item())


def fit_normed() -> Any:
    class Reversed(ByRank):
        """Rank 0 has least, so it keeps up; its buffers are those that all ranks get."""

    module, trainer = Normed(), tiny_trainer(strategy="ddp")
    trainer.fit(module, DataLoader(Reversed(trainer.global_rank), batch_size=2))
    return module.means, module.norm.num_batches_tracked.item()


def test_a_batch_that_is_repeated_to_keep_up_leaves_no_trace_in_batch_statistics() -> None:
    (means, tracked), _ = run_ranks(fit_normed, 2)
    assert means == pytest.approx([0.5, 1.5, 2.5, 2.5, 2.5]), "3 batches of its own, then 2 repeated"
    assert tracked == 3


# --- what cannot be ---------------------------------------------------------------------------------------------------
def fit_with_an_empty_rank() -> None:
    trainer = tiny_trainer(strategy="ddp")
    trainer.fit(Draws(), [torch.zeros(2)] * 0 if trainer.global_rank == 1 else [torch.zeros(2)] * 4)


def fit_with_an_empty_stream() -> None:
    trainer = tiny_trainer(strategy="ddp")
    dataset = ByRank(trainer.global_rank)
    dataset.count = 0 if trainer.global_rank == 1 else 4
    trainer.fit(Draws(), DataLoader(dataset, batch_size=2))


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (fit_with_an_empty_stream, r"The training loader of rank\(s\) 1 is empty, the others' are not"),
        (fit_with_an_empty_rank, "The training data of rank 1 is not that of rank 0: length 0, expected 4"),
    ],
)
def test_an_empty_loader_on_some_ranks_is_refused_on_every_rank(job: Any, message: str) -> None:
    with pytest.raises(RanksFailed, match=message) as failed:
        run_ranks(job, 3, timeout_seconds=30)
    errors = [error.message for error in failed.value.errors.values()]
    assert len(errors) == 3
    assert len(set(errors)) == 1


class Opaque:
    """A batch of which nobody knows how much is in it."""


class TakesAnything(Draws):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.weight * 1.0


class WeighsOpaque(TakesAnything):
    def loss_weight(self, batch: Any) -> float:
        return 2.0


def fit_opaque(kind: type[pl.Module], opaque_rank: int, accumulate: int) -> int:
    trainer = tiny_trainer(strategy="ddp", accumulate_grad_batches=accumulate, use_distributed_sampler=False)
    batch: Any = Opaque() if opaque_rank in (trainer.global_rank, -1) else torch.zeros(2)
    trainer.fit(kind(), [batch] * 4)
    return trainer.global_step


def test_a_batch_without_a_size_is_refused_on_every_rank_where_micro_batches_are_weighed() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(fit_opaque, 2, TakesAnything, 1, 1, timeout_seconds=30)
    errors = [error.message for error in failed.value.errors.values()]
    assert len(errors) == 2
    assert all("has no size that could be found (on rank(s) 1)" in message for message in errors)
    assert all("Define loss_weight(self, batch) in your module" in message for message in errors)
    with pytest.raises(ConfigurationError, match=r"A batch of type Opaque has no size .* Define loss_weight"):
        fit_opaque(TakesAnything, -1, 2)


def test_a_batch_without_a_size_is_fine_where_loss_weight_knows_it_or_nothing_is_weighed() -> None:
    assert run_ranks(fit_opaque, 2, WeighsOpaque, 1, 1) == [4, 4]
    assert fit_opaque(WeighsOpaque, -1, 2) == 2
    assert fit_opaque(TakesAnything, -1, 1) == 4


# --- resuming ---------------------------------------------------------------------------------------------------------
class Stateful(Sized):
    """Knows its place; where a limit cuts an epoch short, the next one goes on from there."""

    read = 0

    def __init__(self, count: int = COUNT) -> None:
        super().__init__(count)
        self.place = 0

    def __iter__(self) -> Iterator[int]:
        while self.place < self.count:
            self.place += 1
            Stateful.read += 1
            yield self.place - 1
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class StatefulWithoutLength(Stateful):
    def __len__(self) -> int:
        raise TypeError("nobody knows")


class OwnLoader:
    """A loader of the user's, that is no DataLoader."""

    def __init__(self) -> None:
        self.dataset = Stateful(12)

    def __iter__(self) -> Iterator[Any]:
        return (torch.tensor([10 * item, 10 * item + 1]) for item in self.dataset)

    def state_dict(self) -> dict[str, Any]:
        return self.dataset.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dataset.load_state_dict(state)


def make_loader(kind: str, workers: int = 0) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    loaders: dict[str, Any] = {
        "torchdata, stateful": lambda: StatefulDataLoader(Stateful(), batch_size=2, num_workers=workers),
        "torchdata, persistent": lambda: StatefulDataLoader(
            Stateful(), batch_size=2, num_workers=workers, persistent_workers=True
        ),
        "torchdata, plain": lambda: StatefulDataLoader(Stream(), batch_size=2, num_workers=workers),
        "plain loader, stateful": lambda: DataLoader(Stateful(), batch_size=2, num_workers=workers),
        "plain loader, no length": lambda: DataLoader(StatefulWithoutLength(), batch_size=2, num_workers=workers),
        "own loader": OwnLoader,
        "no state": lambda: DataLoader(Stream(), batch_size=2, num_workers=workers),
        "batches from the data set": lambda: DataLoader(Batches(), batch_size=None, shuffle=True),
    }
    return loaders[kind]()


class Batches(torch.utils.data.Dataset[Any]):
    """A map-style data set of batches: nothing has to be read to find the place."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        Stateful.read += 1
        return torch.tensor([2 * index, 2 * index + 1])


def run(root: str, kind: str, workers: int, ckpt_path: str | None = None, **options: Any) -> dict[str, Any]:
    """Everything that a resumed run must share with the whole one."""
    pl.seed_everything(3, verbose=False)
    Stateful.read = 0
    module = Draws()
    save = ModelCheckpoint(dirpath=f"{root}/saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    arguments: dict[str, Any] = {"max_epochs": 2, "default_root_dir": root, "enable_checkpointing": True}
    if ckpt_path is None:
        arguments["callbacks"] = save
    else:
        arguments["enable_checkpointing"] = False
    trainer = tiny_trainer(**arguments | options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, make_loader(kind, workers), ckpt_path=ckpt_path)
    told = [str(one.message) for one in caught if "once more and throws them away" in str(one.message)]
    return {
        "ids": module.ids,
        "weight": module.weight.item(),
        "mean": float(trainer.callback_metrics["mean_epoch"]),
        "steps": trainer.global_step,
        "read": Stateful.read,
        "told": told,
    }


def resumed_everywhere(kind: str, workers: int, root: str, **options: Any) -> list[Any]:
    """The whole run, and for each of its saves (step, the resumed run)."""
    whole = run(root, kind, workers, **options)
    found: list[Any] = [whole]
    for step in range(1, whole["steps"] + 1):
        path = f"{root}/saved/step={step}.ckpt"
        found.append(run(f"{root}/again", kind, workers, path, **options))
    return found


def compare(found: list[Any]) -> None:
    whole, *resumed = found
    for step, again in enumerate(resumed, 1):
        assert again["ids"] == whole["ids"][len(whole["ids"]) - len(again["ids"]) :], step
        assert {k: again[k] for k in ("weight", "mean", "steps")} == {
            k: whole[k] for k in ("weight", "mean", "steps")
        }, step
    assert len(resumed[-1]["ids"]) < len(resumed[0]["ids"]) < len(whole["ids"])


WITH_STATE = [
    "torchdata, stateful",
    "plain loader, stateful",
    "plain loader, no length",
    "own loader",
    "batches from the data set",
]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 5}, {"limit_train_batches": 5}])
@pytest.mark.parametrize("kind", WITH_STATE)
def test_a_place_that_was_saved_is_found_without_reading(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    found = resumed_everywhere(kind, 0, str(tmp_path), **options)
    compare(found)
    for again in found[1:]:
        assert not again["told"]
        batches = sum(map(len, again["ids"]))
        assert again["read"] <= (len(again["ids"]) + 1 if kind.startswith("batches") else batches), "read nothing again"


@pytest.mark.parametrize("kind", ["torchdata, stateful", "torchdata, persistent", "torchdata, plain"])
def test_workers_of_torchdatas_loader_go_on_where_they_were(kind: str, tmp_path: Path) -> None:
    compare(resumed_everywhere(kind, 2, str(tmp_path), accumulate_grad_batches=4))


def test_without_state_the_place_is_found_by_reading_and_one_warning_tells_the_cost(tmp_path: Path) -> None:
    found = resumed_everywhere("no state", 0, str(tmp_path), accumulate_grad_batches=5)
    compare(found)
    told = [again["told"] for again in found[1:]]
    assert [len(messages) for messages in told] == [1] * 6
    assert "Resuming reads 5 batches on every rank once more and throws them away" in told[0][0]
    assert "use torchdata's StatefulDataLoader" in told[0][0]


def test_another_number_of_workers_finds_the_place_by_reading(tmp_path: Path) -> None:
    whole = run(str(tmp_path), "torchdata, plain", 0, accumulate_grad_batches=5)
    again = run(str(tmp_path / "r"), "torchdata, plain", 1, f"{tmp_path}/saved/step=1.ckpt", accumulate_grad_batches=5)
    assert len(again["told"]) == 1
    assert again["ids"] == whole["ids"][5:]


def resumed_on_ranks(root: str, kind: str, workers: int, **options: Any) -> list[Any]:
    return resumed_everywhere(kind, workers, root, strategy="ddp", **options)


@pytest.mark.parametrize(("kind", "workers"), [("torchdata, stateful", 0), ("torchdata, stateful", 2), ("no state", 0)])
def test_every_rank_goes_on_where_it_was(kind: str, workers: int, tmp_path: Path) -> None:
    """23 items on 3 ranks: in the end some are dry, and keep up with a batch that they must have."""
    ranks = run_ranks(resumed_on_ranks, 3, str(tmp_path), kind, workers, accumulate_grad_batches=1, timeout_seconds=120)
    for found in ranks:
        compare_rank(found)
        assert kind == "no state" or not any(again["told"] for again in found)


def compare_rank(found: list[Any]) -> None:
    whole, *resumed = found
    for step, again in enumerate(resumed, 1):
        assert again["ids"] == whole["ids"][len(whole["ids"]) - len(again["ids"]) :], step
        assert {k: again[k] for k in ("weight", "mean", "steps")} == {k: whole[k] for k in ("weight", "mean", "steps")}


def resume_on(root: str, ckpt_path: str | None, accumulate: int) -> Any:
    return run(root, "torchdata, stateful", 0, ckpt_path, strategy="ddp", accumulate_grad_batches=accumulate)


def test_on_another_number_of_ranks_the_same_windows_follow(tmp_path: Path) -> None:
    whole = run_ranks(resume_on, 1, str(tmp_path), None, 4)
    again = run_ranks(resume_on, 2, str(tmp_path / "r"), f"{tmp_path}/saved/step=1.ckpt", 2)
    left = sorted(i for batch in whole[0]["ids"][4:12] for i in batch)
    first_epoch = [rank["ids"][:4] for rank in again]
    assert sorted(i for rank in first_epoch for batch in rank for i in batch) == left


def fit_what_nobody_deals() -> int:
    trainer = tiny_trainer(strategy="ddp")
    trainer.fit(Draws(), (torch.zeros(2) for _ in range(3)))
    return trainer.global_step


def test_an_iterable_that_nobody_deals_is_read_by_every_rank_with_one_warning() -> None:
    results = run_ranks(fit_what_nobody_deals, 2)
    assert results == [3, 3]
    warned = ["Every rank reads the training loader (generator) as it comes" in output for output in results.outputs]
    assert warned == [True, False]


class Nine(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(9.0))


def test_a_run_resumed_after_a_short_last_window_has_counted_its_micro_batches(tmp_path: Path) -> None:
    def train(ckpt_path: str | None = None) -> pl.Trainer:
        saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = tiny_trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=saves, enable_checkpointing=True)
        trainer.fit(Summed(), DataLoader(Nine(), 3), ckpt_path=ckpt_path)
        return trainer

    counted = train().progress
    assert counted.total_batches == 6
    assert train(str(tmp_path / "step=2.ckpt")).progress == counted  # after the third of three, in windows of two


def test_a_run_that_failed_inside_a_window_goes_on_from_its_beginning(tmp_path: Path) -> None:
    def train(fails_after: int = -1, ckpt_path: str | None = None) -> pl.Trainer:
        saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=99, save_on_exception=True)
        trainer = tiny_trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=saves, enable_checkpointing=True)
        with suppress(ZeroDivisionError):
            trainer.fit(Summed(fails_after), DataLoader(Nine(), 1), ckpt_path=ckpt_path)
        return trainer

    whole, failed = train(), train(fails_after=3)
    assert failed.progress.batches_in_epoch == 3
    resumed = train(ckpt_path=str(tmp_path / "step=1.ckpt"))
    assert resumed.progress == whole.progress
    assert_same(resumed.model, whole.model)


@pytest.mark.parametrize("limit", [None, 5])
def test_a_run_resumed_after_its_last_step_still_knows_its_place(limit: int | None, tmp_path: Path) -> None:
    def train(max_epochs: int, ckpt_path: str | None = None) -> tuple[float, str]:
        saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = tiny_trainer(
            max_epochs=max_epochs, callbacks=saves, enable_checkpointing=True, limit_train_batches=limit
        )
        module = Summed()
        trainer.fit(module, make_loader("plain loader, stateful"), ckpt_path=ckpt_path)
        return module.weight.item(), trainer.save_checkpoint(tmp_path / "end")

    whole, _ = train(2)
    train(1)
    steps = limit or COUNT // 2
    _, end = train(1, str(tmp_path / f"step={steps}.ckpt"))  # has nothing left to train
    assert train(2, end)[0] == whole


class Summed(pl.Module):
    def __init__(self, fails_after: int = -1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.fails_after = fails_after

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.fails_after:
            raise ZeroDivisionError
        return (batch * self.weight).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)
