"""Which processes did a test start, and how are they ended: by a marker in their environment.

Process groups and sessions do not answer this: torch's elastic agent puts every rank into a session of its own, and
orphans change parents. The environment goes down to every descendant and stays readable from outside.
A program that runs within another marked one carries both markers.
"""

from __future__ import annotations

import signal
import sys
import time
import uuid
from collections.abc import Mapping

import psutil

MARKER_VARIABLE = "PACELINE_TEST_MARKERS"


def new_marker() -> str:
    """A marker that no other process has."""
    return uuid.uuid4().hex


def marked(environment: Mapping[str, str], marker: str) -> dict[str, str]:
    """The environment that makes a process, and all that it starts, one of the `processes_of(marker)`."""
    return {**environment, MARKER_VARIABLE: f"{environment.get(MARKER_VARIABLE, '')} {marker}".strip()}


def processes_of(marker: str) -> list[psutil.Process]:
    """The processes with this marker that are alive now; one that has ended and waits for its parent is not."""
    alive = []
    for process in psutil.process_iter():
        try:
            if marker in process.environ().get(MARKER_VARIABLE, "").split():
                alive.append(process)
        except (psutil.Error, OSError):  # it ended while we looked, or is another user's
            continue
    return alive


def wait_until_gone(marker: str, timeout_seconds: float) -> list[psutil.Process]:
    """Wait for the end of all processes with this marker; return those that are alive when the time is over."""
    deadline = time.monotonic() + timeout_seconds
    while (alive := processes_of(marker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def abort_processes(marker: str) -> None:
    """Make every process with this marker write its Python stacks, then end it.

    A Python process with `faulthandler` enabled (PYTHONFAULTHANDLER=1 does it from outside) answers SIGABRT with the
    stacks of all of its threads, also while it waits in C++ code, and dies of it.
    """
    processes = processes_of(marker)
    for process in processes:
        _send(process, signal.SIGSTOP)  # or a launcher would end the others when the first of them dies
    for process in processes:  # one after the other: those that share a stderr would mix their lines
        _abort(process)
        _wait_until_ended(process, timeout_seconds=2)
    kill_processes(marker)


def kill_processes(marker: str) -> None:
    """End every process with this marker at once, also those started meanwhile."""
    while alive := processes_of(marker):
        for process in alive:
            _send(process, signal.SIGKILL)
        time.sleep(0.01)


def _abort(process: psutil.Process) -> None:
    if sys.platform == "linux":
        try:
            process.rlimit(psutil.RLIMIT_CORE, (0, 0))  # a core file of torch takes seconds and hundreds of MB
        except (psutil.Error, OSError):  # it ended meanwhile; or a container forbids it, and the file is only large
            pass
    _send(process, signal.SIGABRT)
    _send(process, signal.SIGCONT)


def _wait_until_ended(process: psutil.Process, timeout_seconds: float) -> None:
    # Not psutil's wait: it would take the exit code from the Popen object that is to have it.
    deadline = time.monotonic() + timeout_seconds
    while _is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.01)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass
