"""Seeds and random streams: what `seed_everything` does, and who draws from which stream."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy
import pytest
import torch

import paceline as pl
from paceline.errors import ConfigurationError
from paceline.trainer.rng import (
    SEED_VARIABLE,
    Place,
    arrive_at,
    derive_stream_of_rank,
    isolated,
    random_state,
    restore_random_state,
    sample_generator,
    seed_of_run,
)

from helpers.ranks import run_ranks
from helpers.tiny import Sums, numbers, tiny_trainer


def draws() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


# --- seed_everything ------------------------------------------------------------------------------------------------
def test_seed_everything_seeds_the_three_generators_and_returns_the_seed() -> None:
    assert pl.seed_everything(7) == 7
    first = draws()
    assert pl.seed_everything(7) == 7
    assert draws() == first
    pl.seed_everything(8)
    assert draws() != first


def test_seed_everything_without_a_seed_takes_the_one_in_the_environment_or_draws_one() -> None:
    os.environ[SEED_VARIABLE] = "99"
    assert pl.seed_everything() == 99
    del os.environ[SEED_VARIABLE]
    drawn = pl.seed_everything()
    assert 0 <= drawn < 2**32
    assert os.environ[SEED_VARIABLE] == str(drawn)
    assert pl.seed_everything() == drawn


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "7", True])
def test_a_seed_that_is_none_is_refused(seed: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"use a whole number from 0 to 4294967295"):
        pl.seed_everything(seed)


def test_seed_everything_takes_lightnings_options() -> None:
    assert pl.seed_everything(3, workers=True, verbose=False) == 3


# --- the seed of a run ----------------------------------------------------------------------------------------------
def test_the_seed_of_a_run_is_the_users_by_seed_everything_or_by_torch() -> None:
    torch.manual_seed(5)
    assert seed_of_run() == (5, False)
    pl.seed_everything(6)
    torch.manual_seed(5)
    assert seed_of_run() == (6, False)


def drawn_seed() -> tuple[int, float]:
    torch.seed()  # 64 random bits, as when torch starts
    trainer = tiny_trainer(strategy="ddp")
    module = DrawsInSetup()
    trainer.fit(module, numbers(4))
    return trainer.seed, module.drawn


class DrawsInSetup(Sums):
    def configure_model(self) -> None:
        self.drawn = torch.rand(()).item()


def test_without_a_seed_rank_0_draws_one_which_all_use_and_which_is_printed() -> None:
    results = run_ranks(drawn_seed, 2)
    assert results[0] == results[1]
    assert f"seed {results[0][0]} (drawn)" in results.outputs[0]
    assert results[0][0] != run_ranks(drawn_seed, 2)[0][0]
    assert pl.seed_everything(results[0][0]) == results[0][0]


# --- streams --------------------------------------------------------------------------------------------------------
def test_isolated_draws_leave_the_streams_outside_alone() -> None:
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    expected = draws()
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    with isolated(123):
        inside = draws()
    assert draws() == expected
    with isolated(123):
        assert draws() == inside
    with pytest.raises(KeyError), isolated():
        draws()
        raise KeyError
    state = random_state()
    after = draws()
    restore_random_state(state)
    assert draws() == after


def test_rank_0_keeps_its_stream_and_the_others_derive_theirs() -> None:
    found = []
    for rank, step in ((0, 0), (1, 0), (2, 0), (1, 50), (1, 0)):
        torch.manual_seed(4)
        derive_stream_of_rank(4, step, rank)
        found.append(draws()[2])
    torch.manual_seed(4)
    assert found[0] == float(torch.rand(()))
    assert found[1] == found[4]
    assert len(set(found)) == 4


class Draws(Sums):
    """What it drew: while it was built and set up, when fit started, and in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[str, list[float]] = {"built": [float(torch.rand(()))], "start": [], "step": []}

    def setup(self, stage: str) -> None:
        self.drawn["built"].append(float(torch.rand(())))

    def on_fit_start(self) -> None:
        self.drawn["built"].append(random.random())

    def on_train_start(self) -> None:
        self.drawn["start"].append(float(torch.rand(())))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.drawn["step"].append(float(torch.rand(())))
        return super().training_step(batch, batch_idx)


def drawn_in_a_fit(strategy: str = "ddp") -> dict[str, list[float]]:
    pl.seed_everything(5, verbose=False)
    module = Draws()
    tiny_trainer(strategy=strategy).fit(module, numbers(8, batch_size=1))
    return module.drawn


def test_one_common_stream_until_training_starts_and_one_a_rank_from_then_on() -> None:
    alone = drawn_in_a_fit("single")
    first, second = run_ranks(drawn_in_a_fit, 2)
    assert first["built"] == second["built"] == alone["built"]
    assert first["start"] == second["start"] == alone["start"]
    assert first["step"] == alone["step"][:4]
    assert not set(first["step"]) & set(second["step"])


def test_the_same_seed_draws_the_same_again() -> None:
    assert drawn_in_a_fit("single") == drawn_in_a_fit("single")
    assert run_ranks(drawn_in_a_fit, 2) == run_ranks(drawn_in_a_fit, 2)


def test_the_generator_of_a_sample_depends_on_seed_epoch_and_index_alone() -> None:
    def drawn(index: int) -> float:
        return float(torch.rand((), generator=sample_generator(index)))

    arrive_at(Place(1, 0, 0), in_worker=False)
    first = drawn(7)
    arrive_at(Place(1, 0, 500), in_worker=False)
    assert drawn(7) == first
    assert drawn(8) != first
    arrive_at(Place(1, 1, 0), in_worker=False)
    assert drawn(7) != first
