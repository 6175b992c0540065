"""Training data: the order of samples is a function of seed and epoch alone, and loaders are taken over as they are.

Modules note the ids that they are given; `global_batches_seen` puts the notes of all ranks together again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from paceline.trainer.combined import CombinedLoader
from paceline.trainer.plan import permutation

from helpers.ranks import RanksFailed, run_ranks
from helpers.tiny import Numbers, Sums, assert_same, numbers, tiny_trainer, weights

COUNT = 26


class Notes(Sums):
    """Keeps, for each window, the ids of each of its micro-batches; those of weight zero are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.windows: list[list[list[int]]] = [[]]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        ghost = self.trainer.metrics.weight == 0.0
        self.windows[-1].append([] if ghost else [int(i) for i in torch.as_tensor(batch).reshape(-1)])
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step()
        self.windows.append([])

    @property
    def ids(self) -> list[int]:
        return [i for window in self.windows for batch in window for i in batch]


def windows_of_a_fit(make_data: Any, arguments: dict[str, Any]) -> list[list[list[int]]]:
    module = Notes()
    tiny_trainer(**{"strategy": "ddp", **arguments}).fit(module, make_data())
    return module.windows[:-1]


def global_batches_seen(ranks: list[list[list[list[int]]]]) -> list[list[int]]:
    """The ids of each global batch in order: micro-batch j of rank r is part j * ranks + r."""
    assert len({len(windows) for windows in ranks}) == 1
    together = []
    for shares in zip(*ranks, strict=True):
        assert len({len(share) for share in shares}) == 1, "every rank runs as many forwards as the others"
        together.append([i for parts in zip(*shares, strict=True) for part in parts for i in part])
    return together


# --- the order of samples -------------------------------------------------------------------------------------------
def shuffled(batch_size: int, workers: int) -> Any:
    return numbers(COUNT, batch_size, shuffle=True, num_workers=workers)


def seen_with(batch_size: int, workers: int) -> Any:
    torch.manual_seed(11)
    return windows_of_a_fit(lambda: shuffled(batch_size, workers), {"global_batch_size": 8, "max_epochs": 2})


def test_the_global_batches_depend_on_neither_ranks_nor_micro_batches_nor_workers() -> None:
    expected = []
    for epoch in range(2):
        order = permutation(COUNT, 11, epoch)
        expected += [order[start : start + 8] for start in range(0, COUNT, 8)]
    for ranks, batch_size, workers in ((1, 2, 0), (1, 8, 0), (2, 2, 0), (2, 3, 0), (3, 2, 0), (4, 2, 0), (2, 2, 2)):
        seen = run_ranks(seen_with, ranks, batch_size, workers)
        assert global_batches_seen(list(seen)) == expected, (ranks, batch_size, workers)


def test_another_seed_or_epoch_is_another_order_and_the_same_is_the_same() -> None:
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        module = Notes()
        tiny_trainer(max_epochs=2).fit(module, numbers(COUNT, shuffle=True))
        assert sorted(module.ids[:COUNT]) == sorted(module.ids[COUNT:]) == list(range(COUNT))
        assert module.ids[:COUNT] != module.ids[COUNT:]
        orders.append(module.ids)
    assert orders[0] == orders[1] != orders[2]


def test_a_generator_of_the_users_decides_the_order_whatever_the_seed() -> None:
    orders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = Notes()
        tiny_trainer().fit(module, numbers(COUNT, shuffle=True, generator=torch.Generator().manual_seed(99)))
        orders.append(module.ids)
    assert orders[0] == orders[1] == permutation(COUNT, 99, 0)[:]


def test_drop_last_drops_the_short_global_batch() -> None:
    module = Notes()
    tiny_trainer(accumulate_grad_batches=3).fit(module, numbers(COUNT, 2, drop_last=True))
    assert module.ids == list(range(24))


# --- samplers of the user -------------------------------------------------------------------------------------------
class Backwards(Sampler[int]):
    def __init__(self, length: int) -> None:
        self.length = length
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length - 1, -1, -1))

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


SAMPLERS: dict[str, Any] = {
    "backwards": lambda: Backwards(COUNT),
    "weighted": lambda: WeightedRandomSampler([float(1 + i % 3) for i in range(COUNT)], COUNT),
    "replacement": lambda: RandomSampler(range(COUNT), replacement=True, num_samples=15),
    "with a generator": lambda: WeightedRandomSampler([1.0] * COUNT, 10, generator=torch.Generator().manual_seed(5)),
}


def seen_with_sampler(name: str, strategy: str) -> Any:
    torch.manual_seed(3)
    make_data = lambda: DataLoader(Numbers(COUNT), batch_size=2, sampler=SAMPLERS[name]())  # noqa: E731
    return windows_of_a_fit(make_data, {"strategy": strategy, "global_batch_size": 6, "max_epochs": 2})


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_users_sampler_is_drawn_alike_on_all_ranks_and_then_sliced(name: str) -> None:
    alone = global_batches_seen([seen_with_sampler(name, "single")])
    if name == "backwards":
        assert [i for batch in alone for i in batch] == list(range(COUNT - 1, -1, -1)) * 2
    else:
        half = len(alone) // 2
        assert alone[:half] != alone[half:], "another epoch, another draw"
    for ranks in (2, 3):
        assert global_batches_seen(list(run_ranks(seen_with_sampler, ranks, name, "ddp"))) == alone


def test_a_users_sampler_is_told_the_epoch() -> None:
    sampler = Backwards(4)
    tiny_trainer(max_epochs=3).fit(Notes(), DataLoader(Numbers(4), sampler=sampler))
    assert list(dict.fromkeys(sampler.epochs)) == [0, 1, 2]


class Grouped(Sampler[list[int]]):
    """Batches of sizes 1, 2, 3, ... in a random order."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[list[int]]:
        batches = [list(range(n * (n + 1) // 2, (n + 1) * (n + 2) // 2)) for n in range(5)]
        random.shuffle(batches)
        return iter(batches)


def seen_with_batch_sampler(strategy: str, plain: bool) -> Any:
    torch.manual_seed(3)
    sampler: Any = BatchSampler(SequentialSampler(range(15)), 4, drop_last=False) if plain else Grouped()
    return windows_of_a_fit(
        lambda: DataLoader(Numbers(15), batch_sampler=sampler), {"strategy": strategy, "max_epochs": 2}
    )


@pytest.mark.parametrize("plain", [True, False])
def test_a_users_batch_sampler_keeps_its_batches_which_are_dealt_whole(plain: bool) -> None:
    alone = [batch for window in seen_with_batch_sampler("single", plain) for batch in window]
    for epoch in (alone[: len(alone) // 2], alone[len(alone) // 2 :]):
        assert sorted(map(len, epoch)) == ([3, 4, 4, 4] if plain else [1, 2, 3, 4, 5])
        assert sorted(i for batch in epoch for i in batch) == list(range(15))
    together = run_ranks(seen_with_batch_sampler, 2, "ddp", plain)
    batches = [batch for shares in zip(*together, strict=True) for share in shares for batch in share if batch]
    assert batches == alone


def test_a_data_set_that_makes_the_batches_itself_is_dealt_too() -> None:
    class MakesBatches(Dataset[Tensor]):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> Tensor:
            return torch.arange(index * 3, index * 3 + 3)

    module = Notes()
    trainer = tiny_trainer()
    trainer.fit(module, DataLoader(MakesBatches(), batch_size=None, shuffle=False))
    assert module.ids == list(range(15))
    assert trainer.num_training_batches == 5


class NamedIndices(Sampler[str]):
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[str]:
        return iter(["2", "0", "1"])


def test_indices_may_be_anything_that_the_data_set_knows() -> None:
    class ByName(Dataset[int]):
        def __getitem__(self, name: str) -> int:
            return int(name) * 10

        def __len__(self) -> int:
            return 3

    module = Notes()
    tiny_trainer().fit(module, DataLoader(ByName(), sampler=NamedIndices()))
    assert module.ids == [20, 0, 10]


def seen_with_own_dealing() -> list[int]:
    import torch.distributed as dist

    class Deals(Notes):
        def train_dataloader(self) -> Any:
            sampler = DistributedSampler(Numbers(8), dist.get_world_size(), dist.get_rank(), shuffle=False)
            return DataLoader(Numbers(8), batch_size=2, sampler=sampler)

    module = Deals()
    tiny_trainer(strategy="ddp").fit(module)
    return module.ids


def test_a_sampler_that_deals_by_rank_itself_is_left_alone() -> None:
    assert run_ranks(seen_with_own_dealing, 2) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def seen_by_each_rank(take_over: bool) -> list[int]:
    module = Notes()
    tiny_trainer(strategy="ddp", use_distributed_sampler=take_over).fit(module, numbers(8))
    return module.ids


def test_use_distributed_sampler_false_leaves_every_loader_alone() -> None:
    assert run_ranks(seen_by_each_rank, 2, False) == [list(range(8))] * 2
    assert run_ranks(seen_by_each_rank, 2, True) == [[0, 1, 4, 5], [2, 3, 6, 7]]


# --- loaders of the user --------------------------------------------------------------------------------------------
class OwnLoader(DataLoader[Any]):
    """Its signature is its own, and its iteration changes the batches."""

    made = 0

    def __init__(self, path: str, *, how_many: int) -> None:
        OwnLoader.made += 1
        super().__init__(Numbers(how_many), batch_size=2, shuffle=True)
        self.path = path

    def __iter__(self) -> Any:
        return (batch + 100 for batch in super().__iter__())


def test_a_loader_of_ones_own_class_is_taken_over_without_making_another() -> None:
    OwnLoader.made = 0
    data, module = OwnLoader("somewhere", how_many=7), Notes()
    torch.manual_seed(4)
    tiny_trainer().fit(module, data)
    assert OwnLoader.made == 1
    assert module.ids == [100 + i for i in permutation(7, 4, 0)[:]]


def test_the_users_loader_stays_as_it_was() -> None:
    generator = torch.Generator().manual_seed(7)
    data = numbers(6, shuffle=True, generator=generator)
    sampler, batch_sampler, state = data.sampler, data.batch_sampler, generator.get_state()
    trainer = tiny_trainer()
    trainer.fit(Notes(), data)
    assert trainer.train_dataloader is data
    assert data.sampler is sampler
    assert data.batch_sampler is batch_sampler
    assert data.generator is generator
    assert torch.equal(generator.get_state(), state)
    assert len(list(data)) == 3


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True, "prefetch_factor": 4}])
def test_workers_change_nothing(options: dict[str, Any]) -> None:
    seen = []
    for more in ({}, {"num_workers": 2, **options}):
        torch.manual_seed(1)
        module = Notes()
        tiny_trainer(max_epochs=2).fit(module, numbers(7, shuffle=True, **more))
        seen.append(module.windows)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_draws_nothing_from_the_global_random_streams(workers: int) -> None:
    import numpy

    class Validates(Notes):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    options: dict[str, Any] = {"num_workers": workers}
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    trainer, module = tiny_trainer(max_epochs=2), Validates()
    trainer.fit(module, numbers(6, shuffle=True, **options), numbers(3, shuffle=True, **options))
    trainer.predict(Regressionless(), numbers(6, sampler=WeightedRandomSampler([1.0] * 6, 6), **options))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert numpy.random.get_state()[1].tolist() == before[2]


class Regressionless(Sums):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch


# --- iterables ------------------------------------------------------------------------------------------------------
class Stream(IterableDataset[int]):
    """`count` numbers, without a length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))


class ShardsItself(Stream):
    """Rank r has r + 2 batches."""

    def __iter__(self) -> Iterator[int]:
        import torch.distributed as dist

        rank = dist.get_rank()
        return iter(range(100 * rank, 100 * rank + 2 * (rank + 2)))


def seen_from_stream(kind: Any, drop_last: bool, accumulate: int) -> Any:
    module = Notes()
    trainer = tiny_trainer(strategy="ddp", max_epochs=2, accumulate_grad_batches=accumulate)
    trainer.fit(module, DataLoader(kind(11), batch_size=2, drop_last=drop_last))
    return module.ids, trainer.global_step, trainer.samples_seen


def test_a_stream_is_dealt_to_the_ranks_item_by_item() -> None:
    results = run_ranks(seen_from_stream, 2, Stream, False, 1)
    ids = [sorted(ids) for ids, _, _ in results]
    assert ids[0] == sorted(list(range(0, 11, 2)) * 2)
    assert ids[1] == sorted(list(range(1, 11, 2)) * 2)
    assert {samples for _, _, samples in results} == {22}
    assert len({steps for _, steps, _ in results}) == 1


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 3), (2, 2)])
def test_streams_of_unequal_lengths_end_together(accumulate: int, steps: int) -> None:
    results = run_ranks(seen_from_stream, 2, ShardsItself, False, accumulate)
    assert results[0] == ([0, 1, 2, 3] * 2, steps * 2, 20)
    assert results[1] == ([100, 101, 102, 103, 104, 105] * 2, steps * 2, 20)


def test_with_drop_last_streams_end_with_the_first() -> None:
    results = run_ranks(seen_from_stream, 2, ShardsItself, True, 1)
    assert results[0][:2] == ([0, 1, 2, 3] * 2, 4)
    assert results[1][:2] == ([100, 101, 102, 103] * 2, 4)


def test_a_list_of_batches_is_dealt_to_the_ranks() -> None:
    assert run_ranks(seen_from_list, 2) == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7]]


def seen_from_list() -> list[int]:
    module = Notes()
    tiny_trainer(strategy="ddp").fit(module, [torch.arange(i, i + 2) for i in range(0, 10, 2)])
    return module.ids


# --- several loaders ------------------------------------------------------------------------------------------------
class NotesPairs(Sums):
    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        parts = batch.items() if isinstance(batch, dict) else enumerate(batch)
        self.pairs.append({name: part.tolist() for name, part in parts if part is not None})
        return self.weight * 1.0


def pairs_of(make: Any) -> list[Any]:
    module = NotesPairs()
    tiny_trainer(strategy="ddp").fit(module, make())
    return module.pairs


def two_loaders() -> Any:
    return {"long": numbers(8), "short": numbers(3)}


def two_loaders_to_the_shortest() -> Any:
    return CombinedLoader(two_loaders(), "min_size")


def test_a_dict_of_loaders_goes_on_with_the_longest() -> None:
    module = NotesPairs()
    tiny_trainer().fit(module, two_loaders())
    assert [pair["long"] for pair in module.pairs] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [pair["short"] for pair in module.pairs] == [[0, 1], [2], [0, 1], [2]]


def test_a_list_of_loaders_makes_lists_of_batches() -> None:
    module = NotesPairs()
    tiny_trainer().fit(module, [numbers(4), numbers(4, batch_size=1)])
    assert [pair[0] for pair in module.pairs] == [[0, 1], [2, 3], [0, 1], [2, 3]]


def test_each_loader_of_a_collection_is_dealt_to_the_ranks() -> None:
    first, second = run_ranks(pairs_of, 2, two_loaders)
    assert [pair["long"] for pair in first] == [[0, 1], [4, 5]]
    assert [pair["long"] for pair in second] == [[2, 3], [6, 7]]
    assert {i for ranks in (first, second) for pair in ranks for i in pair["short"]} == {0, 1, 2}
    first, second = run_ranks(pairs_of, 2, two_loaders_to_the_shortest)
    assert len(first) == len(second) == 1


def test_shuffled_loaders_of_a_collection_have_orders_of_their_own() -> None:
    module = NotesPairs()
    tiny_trainer().fit(module, {name: numbers(COUNT, shuffle=True) for name in ("left", "right")})
    left, right = ([i for pair in module.pairs for i in pair[name]] for name in ("left", "right"))
    assert sorted(left) == sorted(right) == list(range(COUNT))
    assert left != right


# --- data that differs between the ranks ----------------------------------------------------------------------------
def fit_other_data(per_rank: dict[int, int]) -> None:
    class Makes(Notes):
        def train_dataloader(self) -> Any:
            return numbers(per_rank[self.global_rank])

    tiny_trainer(strategy="ddp").fit(Makes())


def test_ranks_with_other_data_are_told_so_on_every_rank() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(fit_other_data, 2, {0: 8, 1: 10})
    assert len(failed.value.errors) == 2
    for error in failed.value.errors.values():
        assert "The training data of rank 1 is not that of rank 0: length 10, expected 8" in error.message


def fit_small_global_batch() -> None:
    tiny_trainer(strategy="ddp", global_batch_size=2).fit(Notes(), numbers(8))


def test_a_global_batch_smaller_than_the_ranks_is_refused_on_every_rank() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(fit_small_global_batch, 3)
    assert len(failed.value.errors) == 3
    assert all("global_batch_size=2 cannot be shared by 3 ranks" in e.message for e in failed.value.errors.values())


# --- dropout and other draws ----------------------------------------------------------------------------------------
class Draws(Sums):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.weight += torch.rand(())
        return super().training_step(batch, batch_idx)


def test_what_a_step_draws_does_not_depend_on_workers() -> None:
    found = []
    for workers in (0, 2):
        torch.manual_seed(5)
        module = Draws()
        data = numbers(6, shuffle=True, num_workers=workers)
        tiny_trainer(max_epochs=2).fit(module, data)
        found.append(weights(module))
    assert_same(*found)
