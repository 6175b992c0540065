"""`SignalWatch`: SIGTERM and SIGUSR1 are this rank's wish to save and stop, not its end.

Clusters send them ahead of a time limit or a preemption. A signal comes at any line of code and to one rank alone, so
all it does is to set a flag; `control.py` makes of it what all ranks do after the same window. Data workers, which are
signalled together with their rank, must outlive it (`WorkerStart`).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from ..errors import LaunchError, Suspended

LAUNCHER_PID = "PACELINE_LAUNCHER_PID"
"""The variable that tells ranks the process of our launcher; other launchers do not set it."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ASKING = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class SignalWatch:
    """While it is entered, `came` tells whether one of the signals came.

    A handler of the user's own keeps its signal, and so does one who ignores it. Only the main thread can watch.
    """

    def __init__(self) -> None:
        self.came = False
        self._watched: list[int] = []

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for number in _ASKING:
                if is_free(signal.getsignal(number)):
                    signal.signal(number, self._note)
                    self._watched.append(number)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Suspended):
            return  # the process is to end with 75, and one more signal must not change that
        for number in self._watched:
            signal.signal(number, signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True


def is_free(handler: Any) -> bool:
    """Whether a signal with this handler is nobody's, or a `SignalWatch`'s: the script has none of its own."""
    return handler is signal.SIG_DFL or isinstance(getattr(handler, "__self__", None), SignalWatch)


def end_with_launcher() -> None:
    """A rank whose launcher is killed gets SIGTERM, so that it saves and ends; on Linux, where the kernel sends it.

    Raises LaunchError where the launcher has gone already: there is nobody to meet.
    """
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        os.kill(int(launcher), 0)
    except ProcessLookupError as error:
        raise LaunchError(
            f"The launcher (pid {launcher}) that started this rank was killed. Start the command again."
        ) from error


class WorkerStart:
    """The first thing that a data worker does: it leaves signals to its rank, which ends it when the time has come.

    Python does not tell who sent a signal, and the rank too ends workers by SIGTERM as it exits. So it first says, in
    shared memory, that all is over.
    """

    def __init__(self, then: Callable[[int], Any] | None) -> None:
        self._then = then
        self._over = multiprocessing.RawValue(ctypes.c_bool, False)
        weakref.finalize(self, setattr, self._over, "value", True)  # at exit before multiprocessing ends its children

    def __call__(self, worker_id: int) -> None:
        """What torch calls as the worker starts; then what the user's function says."""
        for number in _ASKING:
            signal.signal(number, self._end_when_over)
        if self._then is not None:
            self._then(worker_id)

    def _end_when_over(self, number: int, frame: FrameType | None) -> None:
        if self._over.value:
            os._exit(0)
