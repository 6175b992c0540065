from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

import pytest

from paceline.trainer.faults import Report
from paceline.trainer.verdict import JobEnd, RankEnd, verdict

FAILED = Report(rank=0, time=10.0, text="rank 0 of 2 failed:\nValueError: x\n")
CONSEQUENCE = Report(rank=1, time=10.1, text="")


def end(*codes: int | None, first: dict[int, int] | None = None, **facts: Any) -> JobEnd:
    first_down = [RankEnd(rank, 100 + rank, code) for rank, code in (first or {}).items()]
    return JobEnd(codes=list(codes), first_down=first_down, **{"reports": [], **facts})


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (end(0, 0), 0),
        (end(75, 75), 75),
        (end(0, 75), 75),
        (end(75, -signal.SIGTERM), 75),
        (end(75, 1, first={1: 1}), 1),
        (end(3, 4, first={1: 4}), 4),
        (end(-signal.SIGTERM, -signal.SIGKILL, first={1: -signal.SIGKILL}), 137),
        (end(1, -signal.SIGTERM, first={0: 1}, reports=[FAILED]), 1),
        (end(-signal.SIGINT, None, signal_number=signal.SIGINT), 130),
        (end(0, 0, signal_number=signal.SIGTERM), 143),
        (end(75, 75, signal_number=signal.SIGTERM), 75),
        (end(-signal.SIGTERM, -signal.SIGTERM, other_node="node 1 (host b)"), 1),
    ],
)
def test_the_exit_code_of_a_job(job: JobEnd, code: int) -> None:
    assert verdict(job)[0] == code


@pytest.mark.parametrize("job", [end(0, 0), end(75, 75), end(-15, -15, signal_number=15)])
def test_nothing_is_printed_without_a_failure(job: JobEnd) -> None:
    assert verdict(job)[1] == ""


def test_the_cause_is_printed_and_its_consequences_are_not() -> None:
    assert verdict(end(1, 1, first={0: 1, 1: 1}, reports=[FAILED, CONSEQUENCE]))[1] == FAILED.text


def test_a_killed_rank_is_the_cause_of_what_others_report() -> None:
    message = verdict(end(1, -9, first={0: 1, 1: -signal.SIGKILL}, reports=[FAILED]))[1]
    assert message.startswith("rank 1 (pid 101, host ")
    assert message.endswith(
        "was killed by SIGKILL (out of memory? the kernel's log tells); the other ranks were ended.\n"
    )


def test_an_aborted_rank_is_a_consequence_of_what_another_reports() -> None:
    assert verdict(end(1, -6, first={0: 1, 1: -signal.SIGABRT}, reports=[FAILED]))[1] == FAILED.text
    assert "rank 1 (pid 101" in verdict(end(-15, -6, first={1: -signal.SIGABRT}))[1]


def test_a_rank_that_ended_outside_a_run_is_named_last() -> None:
    message = verdict(end(1, 2, first={0: 1, 1: 2}, reports=[FAILED]))[1]
    assert message.startswith(FAILED.text)
    assert message.endswith(" ended with exit code 2; the other ranks were ended.\n")


def test_one_rank_alone_has_no_others() -> None:
    assert verdict(end(2, first={0: 2}))[1].endswith(" ended with exit code 2.\n")


def test_a_failure_before_the_signal_is_printed_and_one_after_it_is_not() -> None:
    job = end(-15, -15, signal_number=signal.SIGINT, signal_time=11.0, reports=[FAILED])
    assert verdict(job) == (130, FAILED.text)
    assert verdict(replace(job, signal_time=9.0)) == (130, "")


def test_other_nodes_are_pointed_to() -> None:
    assert "node 1 (host b) failed or was stopped" in verdict(end(-15, other_node="node 1 (host b)"))[1]
    assert "another node" in verdict(end(1, first={0: 1}, num_nodes=2))[1]


def test_a_signal_without_a_name_is_told_by_its_number() -> None:
    assert str(RankEnd(0, 7, -int(signal.SIGRTMIN + 3))).endswith(f"killed by signal {int(signal.SIGRTMIN + 3)}")
