"""The process of one rank of the pool: takes jobs from the test session, runs them, sends back what came of them.

Read `serve` first. A thread of its own reads the connection, so that the worker ends itself as soon as the session is
gone, also when it was killed, and also when this rank hangs in a collective.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import io
import os
import queue
import resource
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .isolation import isolated

OUTPUT_FILE, STACKS_FILE = "output", "stacks"
"""In the folder of each rank's process."""


@dataclass(frozen=True)
class Job:
    """One call on one rank. The function goes by name; its arguments as `dumps` made them."""

    module: str
    qualname: str
    arguments: bytes
    environment: dict[str, str]
    import_path: list[str]
    folder: Path


class RankError(NamedTuple):
    """An exception as text: its class may exist only in the rank."""

    type_name: str
    message: str
    traceback: str


@dataclass(frozen=True)
class Outcome:
    """What came of a job on one rank: the pickled result or the error."""

    result: bytes = b""
    error: RankError | None = None


def serve(connection_number: int, folder: Path) -> None:
    """Run the jobs that come through the connection until the session closes it; `folder` is this process's own.

    The session answers each outcome with `None`; only then the job's process group is destroyed: other ranks may
    still be talking to this one.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stacks = open(folder / STACKS_FILE, "w")  # noqa: SIM115 - open as long as the process lives
    faulthandler.enable(file=stacks, all_threads=True)
    connection: Connection = Connection(connection_number)
    messages: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, messages, folder), name="reader", daemon=True).start()
    connection.send("ready")
    while True:
        gc.collect()
        gc.freeze()  # imported modules need not be looked through after each job: 0.1 s
        job = messages.get()
        assert job is not None, "a job comes after the end of the one before"
        os.ftruncate(sys.stdout.fileno(), 0)
        with isolated(job.folder), warnings.catch_warnings():
            connection.send(_outcome(job))
            messages.get()


def dumps(value: Any) -> bytes:
    """Pickle; unlike plain pickle it brings tensors of any device (`loads` puts them on the CPU)."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    """The value that `dumps` got, with tensors on the CPU."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


def resolve(module: str, qualname: str) -> Callable[..., Any]:
    """The function with this name, from a module that is imported if need be."""
    found: Any = importlib.import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    function: Callable[..., Any] = found
    return function


def _read(connection: Connection, messages: queue.SimpleQueue[Job | None], folder: Path) -> None:
    while True:
        try:
            messages.put(connection.recv())
        except (EOFError, OSError):  # the session is gone
            shutil.rmtree(folder, ignore_errors=True)
            os.killpg(os.getpgrp(), signal.SIGKILL)  # this process, which leads the group, and its data loaders'


def _outcome(job: Job) -> Outcome:
    os.environ.clear()
    os.environ.update(job.environment)
    sys.path[:] = job.import_path
    try:
        function = resolve(job.module, job.qualname)
        args, kwargs = loads(job.arguments)
        return Outcome(result=dumps(function(*args, **kwargs)))
    except BaseException as error:  # reported, never swallowed: also SystemExit, which would end the pool's process
        return Outcome(error=_as_text(error))


def _as_text(error: BaseException) -> RankError:
    without_this_file = error.__traceback__.tb_next if error.__traceback__ else None
    lines = traceback.format_exception(type(error), error, without_this_file)
    return RankError(type(error).__name__, str(error), "".join(lines))
