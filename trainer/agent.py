"""`run_ranks`: run a command as the ranks of a job on this machine, and answer with the job's exit code.

The engine is torch's elastic agent, the one inside torchrun: it makes the store, hands out ranks and environment, and
starts and watches the processes. Ours is how a job ends: read `_Agent._monitor_workers`, then `verdict.py`.

The surprise: every rank leads a session of its own, so Ctrl-C reaches this process alone. Signals only set a flag
here, for an exception in the middle of starting four ranks would leave two behind.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs, SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from ..errors import LaunchError
from .faults import LAUNCHER_FOLDER, ranks_in_a_run, read_reports
from .meeting import MEETING_SECONDS, Place, meet
from .signals import LAUNCHER_PID, is_free
from .verdict import RESUMABLE, JobEnd, RankEnd, verdict

GRACE_SECONDS = 30.0
"""How long ranks may take to end after SIGTERM, when they have a checkpoint to write."""
INTERRUPT_SECONDS = 10.0
"""How long they may take after Ctrl-C."""
FAILURE_GRACE_SECONDS = 5.0
"""How long the other ranks may take to end when one has failed."""

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def run_ranks(
    command: list[str],
    *,
    devices: int,
    num_nodes: int = 1,
    node_rank: int = 0,
    master_addr: str = "127.0.0.1",
    master_port: int = 0,
    grace_seconds: float = GRACE_SECONDS,
) -> int:
    """Run `command` in `devices` processes, wait for their end and return the exit code of the job.

    The code is 0 when all ranks end with 0; 75 when ranks end with 75 and none fails; otherwise that of the first rank
    to fail (128 + n for signal n), or 128 + n when signal n ends this process. Nothing is printed but a failure.
    After SIGTERM ranks have `grace_seconds` to save and end; SIGUSR1 is handed on to them.
    With several nodes this is called on each, with the address and a free port of node 0; `master_port=0` is for one
    node. Raises `LaunchError` when the nodes do not find each other. For the main thread only.
    """
    _quieten_torch()
    with tempfile.TemporaryDirectory(prefix="paceline-launch-", ignore_cleanup_errors=True) as folder:
        try:
            if num_nodes > 1:
                place = Place("node", node_rank, num_nodes, master_addr, master_port, opens_store=node_rank == 0)
                meet(place, **{"--devices": devices, "--num-nodes": num_nodes})
            spec = _spec(command, devices, num_nodes, node_rank, master_addr, master_port)
            console = _Console(_environment(devices, Path(folder)))
            agent = _Agent(spec, console, Path(folder), node_rank, num_nodes, grace_seconds)
            agent.run()
        except KeyboardInterrupt:  # before the ranks were started, or after they ended
            return 128 + signal.SIGINT
        except (RendezvousError, DistError) as error:
            raise LaunchError(f"The ranks' meeting point at {master_addr} could not be opened: {error}") from error
        code, message = verdict(agent.end())
    if message:
        sys.stderr.write(f"\n{message}")  # a rank may have been ended in the middle of a line, such as a progress bar
        sys.stderr.flush()
    return code


def _spec(
    command: list[str], devices: int, num_nodes: int, node_rank: int, master_addr: str, master_port: int
) -> WorkerSpec:
    alone = num_nodes == 1
    rendezvous = RendezvousParameters(
        backend="c10d" if alone else "static",  # the former finds a free port, the latter keeps to the node's rank
        endpoint=f"{master_addr}:{master_port}",
        run_id=uuid.uuid4().hex if alone else "paceline",
        min_nodes=num_nodes,
        max_nodes=num_nodes,
        local_addr=master_addr if alone else None,  # else a host name, which may not resolve
        rank=node_rank,
        timeout=MEETING_SECONDS,
    )
    return WorkerSpec(
        role="default",
        local_world_size=devices,
        rdzv_handler=get_rendezvous_handler(rendezvous),
        entrypoint=command[0],
        args=tuple(word.replace("$", "$$") for word in command[1:]),  # the agent fills in ${local_rank}
        max_restarts=0,
        monitor_interval=0.1,
        master_addr=None if alone else master_addr,
        master_port=None if alone else master_port,
    )


class _Agent(LocalElasticAgent):
    """torch's agent, which ends ranks the way described above and remembers why."""

    def __init__(
        self,
        spec: WorkerSpec,
        console: LogsSpecs,
        folder: Path,
        node_rank: int,
        num_nodes: int,
        grace_seconds: float,
    ) -> None:
        super().__init__(spec, logs_specs=console)
        self._num_nodes = num_nodes
        self._grace_seconds = grace_seconds
        self._folder = folder
        self._signals = _Signals()
        self._first_down: list[RankEnd] = []
        self._other_node = ""
        self._node = f"node {node_rank} (host {socket.gethostname()})"
        self._resumable_since: float | None = None
        self._next_look_at_nodes = 0.0

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Wait for the other nodes, in C++ code, which Ctrl-C interrupts only by its default: to end the process."""
        before = signal.getsignal(signal.SIGINT)
        if self._num_nodes > 1 and before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            super()._rendezvous(worker_group)
        finally:
            signal.signal(signal.SIGINT, before)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._signals.watch()
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "NONE"  # torch's handlers raise, wherever they interrupt
        started: dict[int, Any] = super()._start_workers(worker_group)
        del os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"]
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Called ten times a second: end all ranks when there is a reason, and tell torch's agent how things are."""
        processes = self._processes()
        for number in self._signals.to_forward():
            _send(processes, number)
        down = [
            RankEnd(worker.global_rank, process.pid, code)
            for worker, process in zip(worker_group.workers, processes, strict=True)
            if (code := process.poll())
        ]
        failed = [end for end in down if end.code != RESUMABLE]
        if self._signals.ending:
            self._tell_other_nodes(worker_group.store)
            self._end_on_signal(processes, self._signals.ending[0])
        elif failed or self._another_node_ended(worker_group.store):
            self._first_down = failed
            self._tell_other_nodes(worker_group.store)
            self._end(processes, signal.SIGTERM, FAILURE_GRACE_SECONDS)
        elif down and any(process.poll() is None for process in processes):
            if self._may_still_save():
                return RunResult(state=WorkerState.HEALTHY)
            self._end(processes, signal.SIGTERM, FAILURE_GRACE_SECONDS)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state is not WorkerState.HEALTHY:
            self._signals.restore()
        return result

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Called by torch's agent at its own end, whatever the cause; the ranks have ended unless it broke down."""
        processes = self._processes()
        if any(process.poll() is None for process in processes):
            self._end(processes, signal.SIGTERM, FAILURE_GRACE_SECONDS)
        self._signals.restore()
        super()._shutdown(*args, **kwargs)

    def end(self) -> JobEnd:
        """How the job ended on this node."""
        return JobEnd(
            codes=[process.poll() for process in self._processes()],
            first_down=self._first_down,
            reports=read_reports(self._folder),
            signal_number=self._signals.ending[0] if self._signals.ending else None,
            signal_time=self._signals.time,
            other_node=self._other_node,
            num_nodes=self._num_nodes,
        )

    def _processes(self) -> list[subprocess.Popen[bytes]]:
        context = self._pcontext
        if not isinstance(context, SubprocessContext):
            return []  # not started yet
        return [handler.proc for _, handler in sorted(context.subprocess_handlers.items())]

    def _may_still_save(self) -> bool:
        """True while the others are waited for after one rank ended with 75: they agreed on it and will do the same."""
        now = time.monotonic()
        self._resumable_since = self._resumable_since or now
        return now < self._resumable_since + self._grace_seconds

    def _end_on_signal(self, processes: list[subprocess.Popen[bytes]], number: int) -> None:
        """Pass Ctrl-C on where it ends a run in order; elsewhere, as while torch is imported, it prints tracebacks."""
        if number == signal.SIGINT and ranks_in_a_run(self._folder) == len(processes):
            self._end(processes, signal.SIGINT, INTERRUPT_SECONDS)
        else:
            grace = INTERRUPT_SECONDS if number == signal.SIGINT else self._grace_seconds
            self._end(processes, signal.SIGTERM, grace)

    def _end(self, processes: list[subprocess.Popen[bytes]], number: int, grace_seconds: float) -> None:
        """Ask the ranks to end, and after a while, or at one more signal, end them and all that they started."""
        deadline, signals = time.monotonic() + grace_seconds, len(self._signals.ending)
        _send(processes, number)  # not to data loaders' workers: a rank that still saves needs them
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline or len(self._signals.ending) > signals:
                break
            time.sleep(0.01)
        for process in processes:
            with suppress(ProcessLookupError, PermissionError):  # nobody is left; macOS: only the dead are
                os.killpg(process.pid, signal.SIGKILL)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):  # a process that hangs in a driver cannot be waited for
                process.wait(FAILURE_GRACE_SECONDS)

    def _another_node_ended(self, store: Any) -> bool:
        """Look into the store of the job once a second; torch's agents do not tell each other."""
        if self._num_nodes == 1 or time.monotonic() < self._next_look_at_nodes:
            return False
        self._next_look_at_nodes = time.monotonic() + 1
        try:
            if store.check([_ENDED_NODE]):
                self._other_node = store.get(_ENDED_NODE).decode()
        except DistError:
            self._other_node = "node 0, which cannot be reached any more,"
        return bool(self._other_node)

    def _tell_other_nodes(self, store: Any) -> None:
        if self._num_nodes > 1 and not self._other_node:
            with suppress(DistError):  # node 0 is gone, and with it the job
                store.set(_ENDED_NODE, self._node)


_ENDED_NODE = "paceline/ended_node"


class _Signals:
    """The signals that came in while ranks ran; `time` is the first's.

    Whoever ignores one, as nohup does with SIGHUP, goes on ignoring it.
    """

    def __init__(self) -> None:
        self.ending: list[int] = []
        self.time = 0.0
        self._forward: list[int] = []
        self._before: dict[int, Any] = {}

    def watch(self) -> None:
        """Note the signals from now on."""
        for number in (*_ENDING, signal.SIGUSR1):
            before = signal.getsignal(number)
            if number in self._before or before in (signal.SIG_IGN, None):
                continue
            if number == signal.SIGUSR1 and not is_free(before):
                continue  # the script's own, such as faulthandler's
            self._before[number] = before
            signal.signal(number, self._note)

    def restore(self) -> None:
        """Put back the handlers from before."""
        while self._before:
            signal.signal(*self._before.popitem())

    def to_forward(self) -> list[int]:
        """The signals since the last call that are the ranks' business alone."""
        taken, self._forward = self._forward, []
        return taken

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._forward.append(number)
        else:
            self.time = self.time or time.time()
            self.ending.append(number)


def _send(processes: Iterable[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        process.send_signal(number)  # nothing where it has ended


class _Console(LogsSpecs):
    """Ranks write to this process's stdout and stderr, and get some variables beside torch's own."""

    def __init__(self, variables: dict[str, str]) -> None:
        super().__init__()
        self._variables = variables

    @property
    def root_log_dir(self) -> str:
        """No log files."""
        return ""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Where each local rank writes: "" is here."""
        for variables in envs.values():
            variables.update(self._variables)
        here = dict.fromkeys(envs, "")
        return LogsDest(stdouts=here, stderrs=here, error_files=here)


def _environment(devices: int, folder: Path) -> dict[str, str]:
    variables = {LAUNCHER_FOLDER: str(folder), LAUNCHER_PID: str(os.getpid())}
    if "OMP_NUM_THREADS" not in os.environ and devices > 1:  # torchrun sets 1, with a warning
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        variables["OMP_NUM_THREADS"] = str(max(1, cores // devices))
    if "PYTHONUNBUFFERED" not in os.environ and not os.isatty(1):
        variables["PYTHONUNBUFFERED"] = "1"  # as under torchrun: a rank that is killed has printed what it printed
    return variables


def _quieten_torch() -> None:
    """Keep the agent's log, many lines for what the verdict says in one, from the terminal. LOGLEVEL brings it back."""
    if "LOGLEVEL" not in os.environ:
        logger = logging.getLogger("torch.distributed.elastic")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
