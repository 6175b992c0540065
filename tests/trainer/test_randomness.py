"""Random streams: what is drawn depends on seed, epoch and sample, and on neither workers nor ranks nor resuming.

A worker's three generators start anew with each micro-batch, from its place in the epoch. `sample_generator` goes
further: what it draws for a sample is the same in whatever micro-batch the sample is read.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import paceline as pl
from paceline.callbacks import ModelCheckpoint
from paceline.errors import ConfigurationError
from paceline.trainer.rng import sample_generator

from helpers.ranks import run_ranks
from helpers.tiny import tiny_trainer

COUNT = 16


class Noise(Dataset[Any]):
    """For each sample its index, a draw of each global generator, and one of the sample's own."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Tensor:
        own = torch.rand((), generator=sample_generator(index)).item()
        drawn = (random.random(), numpy.random.rand(), torch.rand(()).item())
        return torch.tensor([index, own, *drawn], dtype=torch.float64)


class Batches(Noise):
    """The data set makes the batches: indices are those of batches."""

    def __len__(self) -> int:
        return COUNT // 2

    def __getitem__(self, index: int) -> Tensor:
        return torch.stack([super(Batches, self).__getitem__(2 * index + i) for i in range(2)])


class Keeps(pl.Module):
    """What was read, by (epoch, sample)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.read: dict[tuple[int, int], tuple[float, ...]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for index, *drawn in batch.tolist():
            self.read[self.current_epoch, int(index)] = tuple(drawn)
        return self.weight * 1.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def read_with(options: dict[str, Any], trainer_options: dict[str, Any] | None = None, seed: int = 5) -> Any:
    pl.seed_everything(seed, workers=True, verbose=False)
    module = Keeps()
    arguments = {"max_epochs": 2, "strategy": "ddp", **(trainer_options or {})}
    resume = arguments.pop("ckpt_path", None)
    dataset = Batches() if options.get("batch_size", 4) is None else Noise()
    loader = DataLoader(dataset, **{"batch_size": 4, "shuffle": True, **options})
    tiny_trainer(**arguments).fit(module, loader, ckpt_path=resume)
    return module.read


def own(read: dict[Any, tuple[float, ...]]) -> dict[Any, float]:
    """What `sample_generator` gave."""
    return {key: drawn[0] for key, drawn in read.items()}


@pytest.fixture(scope="module")
def one_worker() -> Any:
    """What is read with one worker on one process."""
    (read,) = run_ranks(read_with, 1, {"num_workers": 1})
    return read


# --- workers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 2},
        {"num_workers": 3, "prefetch_factor": 1},
        {"num_workers": 2, "persistent_workers": True},
        {"num_workers": 2, "multiprocessing_context": "spawn"},
    ],
    ids=["2", "3", "persistent", "spawned"],
)
def test_what_workers_draw_does_not_depend_on_how_many_there_are(options: dict[str, Any], one_worker: Any) -> None:
    assert read_with(options) == one_worker
    assert len(one_worker) == 2 * COUNT


def test_every_sample_and_epoch_has_draws_of_its_own(one_worker: Any) -> None:
    for place in range(4):
        assert len({drawn[place] for drawn in one_worker.values()}) == 2 * COUNT


def test_what_workers_draw_does_not_depend_on_ranks_where_micro_batches_are_the_same(one_worker: Any) -> None:
    """Two ranks read the micro-batches that one process accumulates."""
    ranks = run_ranks(read_with, 2, {"num_workers": 2})
    assert ranks[0] | ranks[1] == one_worker
    assert not ranks[0].keys() & ranks[1].keys()


@pytest.mark.parametrize("workers", [1, 2])
def test_resuming_draws_what_would_have_been_drawn(workers: int, one_worker: Any, tmp_path: Path) -> None:
    save = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    read_with({"num_workers": workers}, {"callbacks": save, "enable_checkpointing": True})
    again = read_with({"num_workers": workers}, {"ckpt_path": f"{tmp_path}/step=3.ckpt"})
    assert len(again) == COUNT + 4
    assert again.items() <= one_worker.items()


def test_another_seed_draws_otherwise(one_worker: Any) -> None:
    other = read_with({"num_workers": 1}, seed=6)
    assert not {drawn[0] for drawn in other.values()} & {drawn[0] for drawn in one_worker.values()}
    assert not {drawn[3] for drawn in other.values()} & {drawn[3] for drawn in one_worker.values()}


def test_a_data_set_that_makes_batches_draws_alike_with_any_number_of_workers() -> None:
    one, two = (read_with({"batch_size": None, "num_workers": workers}) for workers in (1, 2))
    assert one == two
    assert own(one) == own(read_with({"batch_size": None}))


# --- the generator of a sample ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"batch_size": 5, "num_workers": 2}])
def test_a_samples_generator_depends_on_neither_workers_nor_micro_batches(
    options: dict[str, Any], one_worker: Any
) -> None:
    assert own(read_with(options)) == own(one_worker)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_samples_generator_does_not_depend_on_ranks(ranks: int, one_worker: Any) -> None:
    read: dict[Any, float] = {}
    for share in run_ranks(read_with, ranks, {"batch_size": 2}):
        read |= own(share)
    assert read == own(one_worker)


class NoiseStream(IterableDataset[Any]):
    """The same samples as a stream; each reads its own worker's share."""

    def __iter__(self) -> Any:
        return (torch.tensor([i, torch.rand((), generator=sample_generator(i)).item()]) for i in range(COUNT))


class Validates(Keeps):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def read_stream(options: dict[str, Any]) -> Any:
    pl.seed_everything(5, verbose=False)
    module = Validates()
    trainer = tiny_trainer(strategy="ddp", max_epochs=2, val_check_interval=1)
    trainer.fit(module, DataLoader(NoiseStream(), batch_size=2, **options), DataLoader(NoiseStream(), batch_size=5))
    return module.read


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(1, {"num_workers": 2}), (1, {"num_workers": 1, "multiprocessing_context": "spawn"}), (2, {"num_workers": 2})],
)
def test_a_samples_generator_is_the_same_in_every_worker_of_a_stream(ranks: int, options: dict[str, Any]) -> None:
    alone = read_stream({})
    assert len(set(alone.values())) == 2 * COUNT, "each epoch draws anew"
    read: dict[Any, Any] = {}
    for share in run_ranks(read_stream, ranks, options):
        read |= share
    assert read == alone


def test_a_samples_generator_may_be_used_outside_of_a_fit() -> None:
    assert torch.equal(torch.rand(2, generator=sample_generator(3)), torch.rand(2, generator=sample_generator(3)))
    assert not torch.equal(torch.rand(2, generator=sample_generator(3)), torch.rand(2, generator=sample_generator(4)))


# --- the streams of ranks ---------------------------------------------------------------------------------------------
class Dropout(Keeps):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.read[0, batch_idx] = (random.random(), numpy.random.rand(), torch.rand(()).item())
        return self.weight * 1.0


def drawn_in_steps(seed: int) -> Any:
    pl.seed_everything(seed, verbose=False)
    module = Dropout()
    tiny_trainer(strategy="ddp").fit(module, DataLoader(Noise(), batch_size=2))
    return list(module.read.values())


def test_every_rank_has_a_stream_of_its_own_that_the_seed_decides() -> None:
    first, second = run_ranks(drawn_in_steps, 3, 5), run_ranks(drawn_in_steps, 3, 5)
    assert list(first) == list(second)
    every = [number for rank in first for draws in rank for number in draws]
    assert len(set(every)) == len(every)
    assert list(run_ranks(drawn_in_steps, 3, 6)) != list(first)


# --- seed_everything --------------------------------------------------------------------------------------------------
def test_seed_everything_seeds_all_generators_and_tells_the_workers() -> None:
    draws = []
    for _ in range(2):
        assert pl.seed_everything(11, workers=True, verbose=False) == 11
        draws.append((random.random(), numpy.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1]
    assert os.environ["PACELINE_SEED"] == "11"
    assert pl.seed_everything(verbose=False) == 11, "the one in the environment"


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "7"])
def test_a_seed_that_is_none_is_refused(seed: Any) -> None:
    with pytest.raises(ConfigurationError, match="use a whole number from 0 to 4294967295"):
        pl.seed_everything(seed)


# --- the same bits twice ----------------------------------------------------------------------------------------------
class Deep(pl.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 32), nn.Dropout(0.3), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layers(batch.float()).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def deterministic_weights(workers: int) -> list[bytes]:
    pl.seed_everything(2, workers=True, verbose=False)
    module = Deep()
    trainer = tiny_trainer(strategy="ddp", deterministic=True, max_epochs=2)
    trainer.fit(module, DataLoader(Noise(), batch_size=4, shuffle=True, num_workers=workers))
    return [bytes(p.detach().contiguous().view(torch.uint8).flatten().tolist()) for p in module.parameters()]


@pytest.mark.parametrize("ranks", [1, 2])
def test_deterministic_gives_the_same_bits_twice(ranks: int) -> None:
    first, second = (run_ranks(deterministic_weights, ranks, workers) for workers in (1, 2))
    assert list(first) == list(second)
    assert first[0] == first[-1]


def run_example(arguments: list[str]) -> str:
    """What examples/augmentation.py prints in the end."""
    import contextlib
    import io
    import runpy

    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "augmentation.py"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        example["main"](arguments)
    return printed.getvalue().strip().rpartition("\n")[2]


def test_the_example_trains_the_same_images_with_workers_and_on_ranks() -> None:
    alone = run_example([])
    assert alone.startswith("Loss 0.")
    assert run_example(["--workers", "2"]) == alone
    assert run_ranks(run_example, 2, ["--devices", "2", "--workers", "1"])[0] == alone
