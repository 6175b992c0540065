"""The ids of the samples of every global batch, recorded on 1 to 4 ranks with 0 and 2 workers: always the same.

Then what users bring: samplers and batch samplers that change with the epoch, loaders of their own classes; and those
that cannot be dealt, which are left alone with one warning, or refused on every rank.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

import paceline as pl
from paceline.errors import ConfigurationError
from paceline.strategies import FSDP, HSDP
from paceline.trainer.plan import permutation

from helpers.ranks import RanksFailed, run_ranks
from helpers.tiny import Numbers, Sums, numbers, tiny_trainer

COUNT, GLOBAL_BATCH, EPOCHS = 29, 12, 2


class Records(Sums):
    """`windows[w][j]` are the ids of micro-batch j of window w on this rank; empty where it only kept up."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))  # one number a rank, for those that shard
        self.windows: list[list[list[int]]] = []
        self.updates = -1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.updates != self.global_step:
            self.updates = self.global_step
            self.windows.append([])
        ghost = self.trainer.metrics.muted
        self.windows[-1].append([] if ghost else [int(i) for i in torch.as_tensor(batch).reshape(-1)])
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append([int(i) for i in batch])


def recorded(make_loader: Callable[..., Any], options: dict[str, Any], *arguments: Any) -> list[list[list[int]]]:
    module = Records()
    pl.seed_everything(5, verbose=False)
    tiny_trainer(**{"max_epochs": EPOCHS, "strategy": "ddp", **options}).fit(module, make_loader(*arguments))
    return module.windows


def together(ranks: list[list[list[list[int]]]]) -> list[list[int]]:
    """The ids of each global batch: part j * ranks + r is micro-batch j of rank r."""
    batches = []
    for window in zip(*ranks, strict=True):
        rows = zip(*window, strict=True)  # every rank ran as many micro-batches
        batches.append([i for row in rows for part in row for i in part])
    return batches


# --- ranks and workers ------------------------------------------------------------------------------------------------
def shuffled(workers: int) -> Any:
    return numbers(COUNT, batch_size=2, shuffle=True, num_workers=workers)


@pytest.mark.parametrize(
    ("workers", "strategy", "counts"),
    [(0, "ddp", (1, 2, 3, 4)), (2, "ddp", (1, 2, 3, 4)), (0, FSDP(), (2, 3, 4)), (0, HSDP(shard=2), (4,))],
    ids=["ddp", "ddp with workers", "fsdp", "hsdp"],
)
def test_every_global_batch_is_the_same_on_1_2_3_and_4_ranks(
    workers: int, strategy: str | FSDP, counts: tuple[int, ...]
) -> None:
    orders = [permutation(COUNT, 5, epoch)[:] for epoch in range(EPOCHS)]
    expected = [order[i : i + GLOBAL_BATCH] for order in orders for i in range(0, COUNT, GLOBAL_BATCH)]
    for ranks in counts:
        options = {"global_batch_size": GLOBAL_BATCH, "strategy": strategy}
        seen = run_ranks(recorded, ranks, shuffled, options, workers)
        assert together(list(seen)) == expected, f"{ranks} ranks"


# --- samplers that change with the epoch ------------------------------------------------------------------------------
class GroupedByLength(Sampler[list[int]]):
    """Batches of samples of like length, in an order of the epoch; how many there are depends on it too."""

    def __init__(self) -> None:
        self.epoch = 0
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.told.append(epoch)

    def _batches(self) -> list[list[int]]:
        size = 3 + self.epoch
        lengths = sorted(range(COUNT), key=lambda i: (i * 7 % 5, i))
        batches = [lengths[i : i + size] for i in range(0, COUNT, size)]
        random.Random(self.epoch).shuffle(batches)
        return batches

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())


def grouped() -> Any:
    return DataLoader(Numbers(COUNT), batch_sampler=GroupedByLength())


def test_a_batch_sampler_may_have_other_batches_each_epoch() -> None:
    alone = recorded(grouped, {"strategy": "single"})
    sizes = [len(batch) for window in alone for batch in window]
    assert sorted(sizes) == sorted([3] * 9 + [2] + [4] * 7 + [1])  # 10 batches, then 8
    assert sorted(i for window in alone[:10] for batch in window for i in batch) == list(range(COUNT))
    for ranks in (2, 3):
        seen = together(list(run_ranks(recorded, ranks, grouped, {})))
        in_order = [batch for window in alone for batch in window]
        epochs = in_order[:10], in_order[10:]
        windows = [batches[i : i + ranks] for batches in epochs for i in range(0, len(batches), ranks)]
        assert seen == [[i for batch in window for i in batch] for window in windows]


def test_a_sampler_is_told_each_epoch_once() -> None:
    loader = grouped()
    recorded(lambda: loader, {"strategy": "single", "max_epochs": 3})
    assert loader.batch_sampler.told == [0, 1, 2]


def with_generator() -> Any:
    sampler = WeightedRandomSampler([1.0] * COUNT, 12, generator=torch.Generator().manual_seed(3))
    return numbers(COUNT, batch_size=4, sampler=sampler)


def test_what_a_sampler_with_a_generator_draws_does_not_depend_on_epochs_before() -> None:
    """So a resumed run, whose generator is fresh, draws as the one that went on."""
    from paceline.trainer.loaders import draw

    sampler = with_generator().sampler
    in_turn = [draw(sampler, 0, epoch, 12) for epoch in range(3)]
    assert in_turn[0] != in_turn[1] != in_turn[2]
    assert [draw(with_generator().sampler, 0, epoch, 12) for epoch in range(3)] == in_turn
    assert sampler.generator.initial_seed() == 3


class Backwards(SequentialSampler):
    def __iter__(self) -> Iterator[int]:
        return iter(range(COUNT - 1, -1, -1))


def test_a_subclass_of_a_known_sampler_is_drawn_not_guessed() -> None:
    found = recorded(lambda: numbers(COUNT, sampler=Backwards(range(COUNT))), {"strategy": "single", "max_epochs": 1})
    assert [i for window in found for batch in window for i in batch] == list(range(COUNT - 1, -1, -1))


# --- samplers that cannot be dealt ------------------------------------------------------------------------------------
class DrawsByItself(Sampler[int]):
    """Draws from a generator that nobody seeded, so otherwise on every rank."""

    def __len__(self) -> int:
        return COUNT

    def __iter__(self) -> Iterator[int]:
        return iter(
            torch.randperm(
                COUNT, generator=torch.Generator().manual_seed(random.SystemRandom().randrange(2**40))
            ).tolist()
        )


def draw_by_itself(call: str) -> None:
    getattr(tiny_trainer(strategy="ddp"), call)(Records(), numbers(COUNT, sampler=DrawsByItself()))


@pytest.mark.parametrize("call", ["fit", "validate"])
def test_a_sampler_that_draws_otherwise_on_each_rank_is_refused_on_every_rank(call: str) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(draw_by_itself, 3, call)
    messages = [error.message for error in failed.value.errors.values()]
    assert len(messages) == 3
    for message in messages:
        assert "DrawsByItself drew other samples on rank(s) 1, 2 than on rank 0" in message
        assert "use_distributed_sampler=False" in message


class SaysTooMuch(Sampler[int]):
    def __len__(self) -> int:
        return COUNT + 3

    def __iter__(self) -> Iterator[int]:
        return iter(range(COUNT))


def test_a_sampler_with_a_wrong_length_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"SaysTooMuch says that it has 32 items \(its __len__\), but drew 29"):
        recorded(lambda: numbers(COUNT, sampler=SaysTooMuch()), {"strategy": "single"})


def fit_own_dealing(kind: str) -> Any:
    import torch.distributed as dist

    class Deals(Records):
        def train_dataloader(self) -> Any:
            sampler = DistributedSampler(range(8), dist.get_world_size(), dist.get_rank(), shuffle=False)
            return numbers(8, batch_size=2, sampler=sampler)

        val_dataloader = train_dataloader

    module, trainer = Deals(), tiny_trainer(strategy="ddp", num_sanity_val_steps=0)
    getattr(trainer, kind)(module)
    return module.windows if kind == "fit" else module.seen


def test_a_sampler_that_deals_by_rank_is_left_alone_with_one_warning() -> None:
    results = run_ranks(fit_own_dealing, 2, "fit")
    assert list(results) == [[[[0, 2]], [[4, 6]]], [[[1, 3]], [[5, 7]]]]
    warned = results.outputs[0].count("is left alone, because its DistributedSampler deals the samples to the ranks")
    assert warned == 2, "one for training, one for validation"
    assert "is left alone" not in results.outputs[1]


def test_a_sampler_that_deals_by_rank_loses_no_sample_in_evaluation() -> None:
    assert run_ranks(fit_own_dealing, 2, "validate") == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


# --- loaders of the user's own classes --------------------------------------------------------------------------------
class Doubles(DataLoader[Any]):
    """Goes on to its base class, and changes what comes."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch + 100


class ReadsIndices(DataLoader[Any]):
    """Reads the batch sampler itself."""

    def __iter__(self) -> Any:
        return (torch.tensor([self.dataset[i] for i in indices]) for indices in self.batch_sampler)


class KeepsAnIterator(DataLoader[Any]):
    """As loaders that never let their workers go: what it reads was settled when it was made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept = list(iter([torch.tensor([0, 1]), torch.tensor([2])]))

    def __iter__(self) -> Any:
        return iter(self.kept)


class SkipsSome(DataLoader[Any]):
    def __iter__(self) -> Any:
        return (batch for batch in super().__iter__() if 3 not in batch)


def own_loader(kind: type[DataLoader[Any]]) -> Any:
    return kind(Numbers(COUNT), batch_size=2, shuffle=True)


@pytest.mark.parametrize(("kind", "more"), [(Doubles, 100), (ReadsIndices, 0)])
def test_a_loader_with_its_own_iteration_is_taken_over(kind: type[DataLoader[Any]], more: int) -> None:
    expected = permutation(COUNT, 5, 0)[:]
    for ranks in (1, 2):
        seen = run_ranks(recorded, ranks, own_loader, {"max_epochs": 1, "global_batch_size": 4}, kind)
        assert [i - more for batch in together(list(seen)) for i in batch] == expected


def test_a_loader_that_does_not_read_its_batch_sampler_is_left_alone_with_one_warning() -> None:
    with pytest.warns(UserWarning, match=r"left alone, because KeepsAnIterator.__iter__ does not read") as warned:
        found = recorded(own_loader, {"strategy": "single", "max_epochs": 1}, KeepsAnIterator)
    assert found == [[[0, 1]], [[2]]]
    assert sum("left alone" in str(one.message) for one in warned) == 1


def test_a_loader_that_gives_other_batches_than_were_drawn_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"SkipsSome.__iter__ gave 14 batches where its batch_sampler drew 15 of"
    ):
        recorded(own_loader, {"strategy": "single"}, SkipsSome)


def test_torchdatas_loader_of_a_map_style_data_set_is_taken_over_too() -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    options = {"strategy": "single", "max_epochs": 1, "global_batch_size": GLOBAL_BATCH}
    loader = stateful.StatefulDataLoader(Numbers(COUNT), batch_size=4, shuffle=True)
    order = permutation(COUNT, 5, 0)[:]
    expected = [order[i : i + GLOBAL_BATCH] for i in range(0, COUNT, GLOBAL_BATCH)]
    assert together([recorded(lambda: loader, options)]) == expected


# --- what cannot be cut -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (grouped, r"a batch sampler of its own \(GroupedByLength\)"),
        (lambda: numbers(COUNT, batch_size=None), "batch_size=None"),
        (lambda: {"a": numbers(4), "b": numbers(4)}, "several loaders in it"),
        (lambda: [torch.zeros(2)] * 4, r"no indices to cut \(list\)"),
    ],
)
def test_a_global_batch_size_is_refused_where_samples_cannot_be_cut(make: Any, what: str) -> None:
    with pytest.raises(ConfigurationError, match=f"global_batch_size needs a map-style DataLoader.*{what}. Use accum"):
        recorded(make, {"strategy": "single", "global_batch_size": 4})


def test_more_samples_than_2_to_the_31_are_shuffled_without_holding_their_order() -> None:
    class Endless(Dataset[int]):
        def __len__(self) -> int:
            return 2**31 + 12345

        def __getitem__(self, index: int) -> int:
            return index

    module = Records()
    pl.seed_everything(5, verbose=False)
    loader = DataLoader(Endless(), batch_size=8, shuffle=True)
    tiny_trainer(limit_train_batches=50).fit(module, loader)
    ids = [i for window in module.windows for batch in window for i in batch]
    assert len(set(ids)) == 400
    assert max(ids) > 2**30


def test_a_sampler_that_is_told_a_replacement_draws_as_many_as_it_says() -> None:
    sampler = RandomSampler(range(COUNT), replacement=True, num_samples=10)
    found = recorded(lambda: numbers(COUNT, sampler=sampler), {"strategy": "single", "max_epochs": 1})
    assert sum(len(batch) for window in found for batch in window) == 10


def test_a_plain_batch_sampler_of_the_users_is_dealt_whole() -> None:
    batches = BatchSampler(SequentialSampler(range(7)), 3, drop_last=False)
    found = recorded(lambda: DataLoader(Numbers(7), batch_sampler=batches), {"strategy": "single", "max_epochs": 1})
    assert found == [[[0, 1, 2]], [[3, 4, 5]], [[6]]]
