from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.trainer.rank_zero import (
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)


@pytest.fixture(autouse=True)
def no_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rank_zero_only, "_rank", None)
    yield


@rank_zero_only
def answer(value: int) -> int:
    """The answer."""
    return value


def test_a_function_runs_on_rank_zero_only() -> None:
    assert answer(42) == 42
    rank_zero_only.rank = 1
    assert answer(42) is None
    assert rank_zero_only(lambda: 42, default=7)() == 7


def test_a_decorated_function_keeps_its_name_and_docstring() -> None:
    assert (answer.__name__, answer.__doc__) == ("answer", "The answer.")


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"])
def test_the_rank_is_read_when_it_is_needed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert rank_zero_only.rank == 0
    monkeypatch.setenv(name, "3")
    assert rank_zero_only.rank == 3
    assert answer(42) is None


def test_the_rank_that_was_set_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    rank_zero_only.rank = 0
    assert answer(42) == 42


def test_torchruns_rank_goes_before_slurms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("RANK", "2")
    assert rank_zero_only.rank == 2


def test_a_warning_blames_the_line_that_gave_it() -> None:
    with pytest.warns(UserWarning, match="careful") as caught:
        rank_zero_warn("careful")
    assert Path(caught[0].filename) == Path(__file__)


def test_a_log_record_names_the_line_that_gave_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="paceline"):
        rank_zero_info("seed %d", 7)
    assert caplog.messages == ["seed 7"]
    assert {record.filename for record in caplog.records} == {Path(__file__).name}


def test_other_ranks_neither_warn_nor_log(caplog: pytest.LogCaptureFixture) -> None:
    rank_zero_only.rank = 1
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG, logger="paceline"):
        warnings.simplefilter("error")
        rank_zero_warn("careful")
        rank_zero_info("seed")
    assert not caplog.messages
