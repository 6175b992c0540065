"""`reported`: an exception that ends a job of several ranks is printed once, with its rank, and last.

Read `reported`, then `_Hook`. When one rank raises, the others soon raise too, since their connections break. So each
failing rank takes a number from the job's store; the first is the cause and has its traceback printed, the others
leave in silence. Under our own launcher (`agent.py`) the traceback goes to the launcher, which prints it when all
ranks have ended and nothing can be written after it; under torchrun, srun or MPI the rank prints it.

The surprise: nothing is decided before the exception reaches the top of the program. A user's `except` around `fit`
keeps its meaning, and one process alone has Python's own traceback.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import io
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

LAUNCHER_FOLDER = "PACELINE_LAUNCHER_FOLDER"
"""The variable that names the folder where ranks leave word for our launcher; other launchers do not set it."""

STORE_TIMEOUT = timedelta(seconds=5)
EXIT_SECONDS = 10
"""How long the exit handlers of a failed rank (a logger's upload) may take before the process is ended anyway."""

_runs = 0
"""How many runs this process has entered; all ranks enter the same ones, so it names a run in the store."""


@dataclass(frozen=True)
class Report:
    """What a failed rank says: when it failed (`time.time()`) and the text to print, "" from a mere consequence."""

    rank: int
    time: float
    text: str


@contextlib.contextmanager
def reported(*, rank: int, world_size: int, where: Callable[[], str]) -> Iterator[None]:
    """Run the body, which all ranks enter alike, and have an exception that ends the program reported as one.

    `where`, called when the body fails, tells the place in the user's terms ("epoch 0, batch 3"). Wrap the run itself
    and not the cleaning up after it: the first rank to leave the body is taken for the cause.
    """
    global _runs
    if world_size == 1:
        yield
        return
    _runs += 1
    facts = f"rank {rank} of {world_size} (host {socket.gethostname()}, pid {os.getpid()})"
    with _marked_as_running(rank):
        try:
            try:
                yield
            except SystemExit:
                raise
            except BaseException as exception:
                turn = _Turn(1) if isinstance(exception, KeyboardInterrupt) else _Turn.take()
                _note(exception, _Failure(rank, f"{facts} failed in {where()}:", time.time(), turn))
                raise
        except KeyboardInterrupt as interrupt:  # again, for it may have come while another exception was dealt with
            _note(interrupt, _Failure(rank, f"{facts} failed:", time.time(), _Turn(1)))
            raise


def _note(exception: BaseException, failure: _Failure) -> None:
    """Have `exception` reported in case it reaches the top of the program."""
    # On the exception, not in the hook, which would keep it and its frames' tensors alive after it was caught.
    setattr(exception, _FAILURE, failure)
    if not isinstance(sys.excepthook, _Hook):
        sys.excepthook = _Hook(sys.excepthook)


_FAILURE = "_paceline_failure"


@dataclass(frozen=True)
class _Failure:
    """What is known of an exception when it leaves a run."""

    rank: int
    header: str
    time: float
    turn: _Turn


class _Hook:
    """Takes the place of `sys.excepthook` from a failure on; for other exceptions it is the hook from before."""

    def __init__(self, previous: Callable[[type[BaseException], BaseException, TracebackType | None], Any]) -> None:
        self._previous = previous

    def __call__(self, kind: type[BaseException], exception: BaseException, trace: TracebackType | None) -> None:
        """Report `exception` and end the process, if it is a failure or was raised because of one."""
        links = (getattr(link, _FAILURE, None) for link in _chain(exception))
        failure: _Failure | None = next(filter(None, links), None)
        if failure is None:
            self._previous(kind, exception, trace)
            return
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more Ctrl-C would be an error in this hook
        # The hook before this one formats the traceback (it may be rich's) and takes note of the failure (wandb's).
        with contextlib.redirect_stderr(io.StringIO()) as captured:
            self._previous(kind, exception, trace)
        if isinstance(exception, KeyboardInterrupt):
            leave(128 + signal.SIGINT)
        text = captured.getvalue() or "".join(traceback.format_exception(exception))
        text = text.replace(f"[rank{failure.rank}]: ", "")  # init_process_group's hook puts it before every line
        if failure.turn.unknown:
            # Without an agent rank 0 holds the store: it is gone, and its end is the cause. One line, not a traceback.
            text = "".join(traceback.format_exception_only(exception))
        text = "" if failure.turn.is_reported_by_the_first() else f"{failure.header}\n{text.rstrip()}\n"
        _deliver(Report(failure.rank, failure.time, text))
        failure.turn.announce()
        leave(1)


def _deliver(report: Report) -> None:
    folder = _launcher_folder()
    if folder is None:
        sys.stdout.flush()
        if report.text:
            sys.stderr.write(f"\n{report.text}")  # the line may have a progress bar on it
        sys.stderr.flush()
    else:
        _write_whole(folder / f"report-{report.rank}.json", json.dumps(asdict(report)))


def leave(code: int) -> NoReturn:
    """End this process now: exit handlers run, within a time limit; threads and destructors are not waited for.

    A process group with a collective under way waits for the other ranks in its destructor, for minutes.
    """
    faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe, a closed file: nobody reads it
            stream.flush()
    os._exit(code)


# --- which rank is the cause ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Turn:
    """This rank's number among the failing ones of a run: 1 is the cause, 0 means that the store cannot be reached.

    Where ranks share no store yet, each counts as the first.
    """

    number: int
    key: str = ""
    store: Store | None = None

    @classmethod
    def take(cls) -> _Turn:
        """Take the next number of the current run."""
        key = f"paceline/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_runs}"
        try:
            store = _shared_store()
            return cls(1) if store is None else cls(store.add(key, 1), key, store)
        except _store_errors():
            return cls(0)

    @property
    def unknown(self) -> bool:
        return self.number == 0

    def is_reported_by_the_first(self) -> bool:
        """Wait a moment for the first's `announce`; False when it does not come: perhaps it caught its exception."""
        if self.number < 2 or self.store is None:
            return False
        try:
            self.store.wait([f"{self.key}/reported"], STORE_TIMEOUT)
        except _store_errors():
            return False
        return True

    def announce(self) -> None:
        """Tell the others that the failure has been reported."""
        if self.store is not None:
            with contextlib.suppress(*_store_errors()):  # then there is nobody to ask
                self.store.set(f"{self.key}/reported", "yes")


def _shared_store() -> Store | None:
    """The store of torch's agent, which outlives every rank, or else that of the default process group."""
    from torch import distributed

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # A connection of our own: that of the process group may be in use by a thread that waits.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        agents_store: Store = distributed.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=False, timeout=STORE_TIMEOUT, wait_for_workers=False
        )
        return agents_store
    if distributed.is_available() and distributed.is_initialized():
        default_store: Store = distributed.distributed_c10d._get_default_store()
        return default_store
    return None


def _store_errors() -> tuple[type[BaseException], ...]:
    from torch import distributed

    return (distributed.DistError,)


def _chain(exception: BaseException | None) -> Iterator[BaseException]:
    """The exception, and those that it was raised from or while handling."""
    seen: set[int] = set()
    waiting = [exception]
    while waiting:
        link = waiting.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            waiting += [link.__cause__, link.__context__]
            yield link


# --- word for our launcher --------------------------------------------------------------------------------------------
def read_reports(folder: Path) -> list[Report]:
    """The reports that ranks left in the launcher's folder, the first to fail first."""
    reports = [Report(**json.loads(path.read_text())) for path in folder.glob("report-*.json")]
    return sorted(reports, key=lambda report: report.time)


def ranks_in_a_run(folder: Path) -> int:
    """How many ranks are inside `reported` now, where Ctrl-C is an exception that they answer in silence."""
    return len(list(folder.glob("running-*")))


@contextlib.contextmanager
def _marked_as_running(rank: int) -> Iterator[None]:
    folder = _launcher_folder()
    if folder is None:
        yield
        return
    mark = folder / f"running-{rank}"
    mark.touch()
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def _launcher_folder() -> Path | None:
    """The launcher's folder; None under other launchers, and when ours is gone."""
    folder = os.environ.get(LAUNCHER_FOLDER)
    return Path(folder) if folder and os.path.isdir(folder) else None


def _write_whole(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text)
    unfinished.replace(path)
