"""Ranks that do not see the same data are told so, all of them, before the first step; what only looks so is let be."""

from __future__ import annotations

import os
import random
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from paceline.trainer.fingerprint import fingerprint

from helpers.ranks import RanksFailed, run_ranks
from helpers.tiny import Numbers, Sums, numbers, tiny_trainer


class Validates(Sums):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    test_step = validation_step


class OnRank:
    """A data set that another rank has otherwise."""

    @staticmethod
    def shorter(rank: int) -> Any:
        return numbers(10 - rank)

    @staticmethod
    def other_content(rank: int) -> Any:
        return DataLoader(TensorDataset(torch.arange(10.0) + rank), batch_size=2)

    @staticmethod
    def other_batch_size(rank: int) -> Any:
        return numbers(10, batch_size=2 + rank)

    @staticmethod
    def other_kind(rank: int) -> Any:
        return numbers(10) if rank == 0 else [torch.zeros(2)] * 5

    @staticmethod
    def other_list(rank: int) -> Any:
        return [torch.full((2,), float(i + rank)) for i in range(5)]

    @staticmethod
    def other_stream_length(rank: int) -> Any:
        return DataLoader(Sized(10 + rank), batch_size=2)

    @staticmethod
    def empty(rank: int) -> Any:
        return numbers(0 if rank else 10)

    @staticmethod
    def in_a_collection(rank: int) -> Any:
        return {"a": numbers(10), "b": numbers(10 - rank)}

    @staticmethod
    def without_batches(rank: int) -> Any:
        return numbers(10 - rank, batch_size=None)


class Sized(IterableDataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        return iter(range(self.count))


def fit_on_ranks(name: str, call: str = "fit") -> None:
    trainer = tiny_trainer(strategy="ddp")
    module = Validates()
    module.training_step = lambda batch, batch_idx: module.weight * 1.0
    getattr(trainer, call)(module, getattr(OnRank, name)(trainer.global_rank))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shorter", "length 9, expected 10"),
        ("other_content", r"sample 0 '\w+', expected '\w+'"),
        ("other_list", r"sample 0 '\w+', expected"),
        ("other_batch_size", "batch_size 3, expected 2"),
        ("other_kind", "loader 'list', expected 'DataLoader'"),
        ("other_stream_length", "length 11, expected 10"),
        ("empty", "length 0, expected 10"),
        ("in_a_collection", "length 9, expected 10"),
        ("without_batches", "length 9, expected 10"),
    ],
)
def test_training_data_that_differs_is_refused_on_every_rank(name: str, message: str) -> None:
    whole = rf"The training data of rank 1 is not that of rank 0: {message}.*use_distributed_sampler=False"
    with pytest.raises(RanksFailed, match=whole) as failed:
        run_ranks(fit_on_ranks, 2, name, timeout_seconds=30)
    assert len(failed.value.errors) == 2
    assert len({error.message for error in failed.value.errors.values()}) == 1


@pytest.mark.parametrize("call", ["validate", "test"])
def test_evaluation_data_that_differs_is_refused_on_every_rank(call: str) -> None:
    stage = {"validate": "validation"}.get(call, call)
    with pytest.raises(RanksFailed, match=f"The {stage} data of rank 1 is not that of rank 0") as failed:
        run_ranks(fit_on_ranks, 2, "other_content", call, timeout_seconds=30)
    assert len(failed.value.errors) == 2


# --- what is the same data all the same -------------------------------------------------------------------------------
class Augmented(Dataset[Any]):
    """Draws from a generator of its own, which nobody seeded, and from the global ones."""

    def __init__(self) -> None:
        self.generator = random.SystemRandom()

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(index + self.generator.random() + random.random())


class Stubborn(Numbers):
    """Its samples cannot be written."""

    def __getitem__(self, index: int) -> Any:
        return lambda: index


def fit_alike(kind: type[Dataset[Any]]) -> int:
    trainer, module = tiny_trainer(strategy="ddp"), Validates()
    module.training_step = lambda batch, batch_idx: module.weight * 1.0
    random.seed(trainer.global_rank)
    dataset = kind() if kind is Augmented else kind(6)  # type: ignore[call-arg]
    trainer.fit(module, DataLoader(dataset, batch_size=1, collate_fn=lambda samples: torch.zeros(len(samples))))
    return trainer.global_step


@pytest.mark.parametrize("kind", [Augmented, Stubborn])
def test_samples_that_are_drawn_or_cannot_be_written_are_not_compared(kind: type[Dataset[Any]]) -> None:
    assert run_ranks(fit_alike, 2, kind) == [3, 3]


class OpensItsFile(Numbers):
    """As data sets over one large file do: opened at the first sample, so that each worker has a handle of its own."""

    opened_by: int | None = None

    def __getitem__(self, index: int) -> Any:
        self.opened_by = self.opened_by or os.getpid()
        assert self.opened_by == os.getpid(), "a worker reads through the handle of its parent"
        return index


def fit_from_a_file() -> int:
    trainer = tiny_trainer(strategy="ddp")
    trainer.fit(Sums(), DataLoader(OpensItsFile(6), batch_size=1, num_workers=1))
    return trainer.global_step


def test_a_file_that_workers_open_is_not_opened_before_them() -> None:
    assert run_ranks(fit_from_a_file, 2) == [3, 3]


def test_a_fingerprint_reads_a_few_samples_and_draws_nothing() -> None:
    class Counts(Numbers):
        read: ClassVar[list[int]] = []

        def __getitem__(self, index: int) -> Any:
            Counts.read.append(index)
            return torch.rand(())

    before = torch.get_rng_state()
    facts = fingerprint(DataLoader(Counts(1_000_000), batch_size=4))
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(set(Counts.read)) == [0, 500_000, 999_999]
    assert facts["length"] == 1_000_000


def test_a_sample_that_is_a_view_of_all_data_is_written_by_itself() -> None:
    """Else a data set of gigabytes would be hashed six times over."""
    import io

    from paceline.trainer.fingerprint import _Writer

    written = io.BytesIO()
    _Writer(written).dump(TensorDataset(torch.zeros(1_000_000, 2))[5])
    assert len(written.getvalue()) < 5_000
