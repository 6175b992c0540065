"""`verdict`: the exit code of a job of ranks, and what its launcher prints about its end.

Pure bookkeeping: `agent.py` collects the facts. The question is which rank is the cause, for when one ends, the others
follow within milliseconds.
"""

from __future__ import annotations

import signal
import socket
from dataclasses import dataclass

from .faults import Report

RESUMABLE = 75
"""The exit code of a rank that saved its state and asks to be started again."""

_NEVER_A_CONSEQUENCE = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
"""Signals that end a rank for a reason of its own; NCCL's watchdog, say, aborts a rank because of another's end."""


@dataclass(frozen=True)
class RankEnd:
    """A rank that has failed; `code` is as subprocess gives it: minus n where signal n ended it."""

    rank: int
    pid: int
    code: int

    @property
    def exit_code(self) -> int:
        """What a shell calls the code."""
        return self.code if self.code > 0 else 128 - self.code

    def __str__(self) -> str:
        rank = f"rank {self.rank} (pid {self.pid}, host {socket.gethostname()})"
        if self.code > 0:
            return f"{rank} ended with exit code {self.code}"
        hint = " (out of memory? the kernel's log tells)" if -self.code == signal.SIGKILL else ""
        return f"{rank} was killed by {_name(-self.code)}{hint}"


@dataclass(frozen=True)
class JobEnd:
    """What a launcher knows when all ranks of its node have ended."""

    codes: list[int | None]
    """Of all ranks, as subprocess gives them; None if one could not be ended."""
    first_down: list[RankEnd]
    """The ranks that had failed when the first failure was seen; whoever ended later was ended by the launcher."""
    reports: list[Report]
    """What failed ranks left word of, the first to fail first."""
    signal_number: int | None = None
    """The signal that told the launcher to end the job, at `signal_time`."""
    signal_time: float = 0.0
    other_node: str = ""
    """The node whose end was the reason to end this one's ranks."""
    num_nodes: int = 1


def verdict(end: JobEnd) -> tuple[int, str]:
    """Return the exit code of the job and what to print; "" when all is well or a signal ended it."""
    if end.signal_number is not None:
        failures = (report.text for report in end.reports if report.time < end.signal_time)
        return RESUMABLE if RESUMABLE in end.codes else 128 + end.signal_number, next(filter(None, failures), "")
    if end.other_node:
        reason = f"{end.other_node} failed or was stopped, so the ranks of this node were ended"
        return 1, f"{reason}; the output there tells more.\n"
    if not end.first_down:
        return RESUMABLE if RESUMABLE in end.codes else 0, ""
    text = next((report.text for report in end.reports if report.text), "")
    explained = {report.rank for report in end.reports}
    silent = [down for down in end.first_down if down.rank not in explained]
    killed = [down for down in silent if -down.code in _NEVER_A_CONSEQUENCE]
    raised = [down for down in silent if down.code > 0]  # outside a run: Python has printed the traceback
    if killed:
        return killed[0].exit_code, _sentence(killed[0], end)
    if raised:
        return raised[0].exit_code, text + _sentence(raised[0], end)
    return (1, text) if text else (end.first_down[0].exit_code, _sentence(end.first_down[0], end))


def _sentence(down: RankEnd, end: JobEnd) -> str:
    if end.num_nodes > 1:
        return f"{down}, and the others were ended. If another node tells of a failure, that may be the cause.\n"
    return f"{down}{'; the other ranks were ended' if len(end.codes) > 1 else ''}.\n"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has none
        return f"signal {number}"
