"""`run_ranks`: run a function of a test in real processes that are the ranks of one gloo job.

    def sums_ranks() -> float: ...                      # calls init_process_group("gloo"), or fits with a strategy

    def test_ranks_sum() -> None:
        assert run_ranks(sums_ranks, 2) == [1.0, 1.0]   # one result a rank

One pool of processes serves all jobs of a test session, because importing torch takes a process seconds: it grows to
the most ranks asked for, and is ended and started anew after a job that hung or killed a rank. `rank_worker` is the
other side. Whatever happens to the session, no process of the pool outlives it.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from .processes import abort_processes, kill_processes, marked, new_marker
from .rank_worker import OUTPUT_FILE, STACKS_FILE, Job, Outcome, RankError, dumps, loads, resolve

START_SECONDS = 120.0
GRACE_SECONDS = 3.0
"""How long the other ranks of a job may still take when one has failed."""


class RankResults(list[Any]):
    """The result of each rank, in the order of ranks; `outputs` is what each wrote to stdout and stderr."""

    def __init__(self, results: Sequence[Any], outputs: Sequence[str]) -> None:
        super().__init__(results)
        self.outputs = list(outputs)


class RanksFailed(Exception):
    """A job of `run_ranks` failed; the message has everything below.

    `errors`: of each rank that raised or died, the first to fail first. `stacks`: the Python stacks of the ranks that
    did not finish in time. `outputs`: what each rank wrote to stdout and stderr.
    """

    def __init__(self, name: str, errors: dict[int, RankError], stacks: dict[int, str], outputs: list[str]) -> None:
        self.errors, self.stacks, self.outputs = errors, stacks, outputs
        super().__init__(_report(name, errors, stacks, outputs))


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    /,
    *args: Any,
    timeout_seconds: float = 60.0,
    cuda: bool = False,
    **kwargs: Any,
) -> RankResults:
    """Return what `function(*args, **kwargs)` returns on each of `world_size` ranks, with tensors on the CPU.

    The function must be defined at the top of an importable file, such as the test's: ranks import it by name. Each
    rank has this process's environment, import path and folder, the variables that torchrun sets, and the same seeds;
    it sees GPUs only with `cuda=True`. The process group that the function makes is destroyed after it.
    Raises `RanksFailed` when a rank raises or dies, or when not all have finished after `timeout_seconds`.
    """
    if world_size < 1:
        raise ValueError(f"world_size={world_size}: a job has at least 1 rank.")
    _check_importable(function)
    pool = _pool(cuda)
    # The launcher holds the store, as under torchrun: its port is surely free, and no rank has to wait for rank 0.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = Job(
        module=function.__module__,
        qualname=function.__qualname__,
        arguments=dumps((args, kwargs)),
        environment=pool.environment(),
        import_path=list(sys.path),
        folder=Path.cwd(),
    )
    return pool.run([_as_rank(job, rank, world_size, store.port) for rank in range(world_size)], timeout_seconds)


def close_pools() -> None:
    """End the processes of all pools; a later `run_ranks` starts new ones."""
    for pool in _pools.values():
        pool.close()


class RankPool:
    """The processes that serve as ranks: process i is rank i of every job."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._marker = new_marker()
        self._workers: list[_Worker] = []

    def environment(self) -> dict[str, str]:
        """The environment of this process, as its ranks have it."""
        hidden = {} if self._cuda else {"CUDA_VISIBLE_DEVICES": ""}
        return marked(os.environ, self._marker) | {"OMP_NUM_THREADS": "1"} | hidden

    def run(self, jobs: list[Job], timeout_seconds: float) -> RankResults:
        """Run one job a rank and wait for all; raises `RanksFailed`."""
        self._start(len(jobs))
        workers = self._workers[: len(jobs)]
        try:
            for worker, job in zip(workers, jobs, strict=True):
                worker.send(job)
            outcomes = _collect(workers, timeout_seconds)
        except BaseException:  # such as Ctrl-C: the ranks are in the middle of the job
            self.close()
            raise
        outputs = [worker.output() for worker in workers]
        errors = {rank: outcome.error for rank, outcome in outcomes.items() if outcome.error}
        unfinished = [rank for rank in range(len(jobs)) if rank not in outcomes]
        if unfinished:
            abort_processes(self._marker)
        stacks = {rank: workers[rank].stacks() for rank in unfinished}
        if unfinished or any(worker.process.poll() is not None for worker in workers):
            self.close()
        if errors or stacks:
            name = f"{jobs[0].module}.{jobs[0].qualname} on {len(jobs)} ranks"
            raise RanksFailed(name, errors, stacks, outputs)
        return RankResults([loads(outcomes[rank].result) for rank in range(len(jobs))], outputs)

    def close(self) -> None:
        """End all processes of this pool and wait for their end."""
        if not self._workers:
            return
        kill_processes(self._marker)
        for worker in self._workers:
            worker.close()
        self._workers = []

    def _start(self, count: int) -> None:
        if any(worker.process.poll() is not None for worker in self._workers):
            self.close()  # one died between two jobs
        ready = len(self._workers)
        try:
            while len(self._workers) < count:
                self._workers.append(_Worker(self.environment()))
            for worker in self._workers[ready:]:
                worker.wait_until_ready()
        except BaseException:
            self.close()
            raise


class _Worker:
    """One process of the pool, seen from the session."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-rank-")
        self._output, self._stacks = Path(self._folder.name, OUTPUT_FILE), Path(self._folder.name, STACKS_FILE)
        self.connection, theirs = Pipe()
        imports = (
            f"import sys; sys.path[:] = {sys.path!r}; from pathlib import Path; from helpers.rank_worker import serve"
        )
        code = f"{imports}; serve({theirs.fileno()}, Path({self._folder.name!r}))"
        with theirs, self._output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-c", code],
                env=dict(environment),
                cwd=self._folder.name,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in the terminal reaches the session, and the session ends the ranks
            )

    def wait_until_ready(self) -> None:
        """Wait until the process has imported torch."""
        if not self.connection.poll(START_SECONDS):
            raise RuntimeError(f"A process of the pool did not start within {START_SECONDS:.0f} s.")
        try:
            self.connection.recv()
        except EOFError:
            raise RuntimeError(f"A process of the pool ended as it started. It wrote:\n{self.output()}") from None

    def outcome(self) -> Outcome | None:
        """What came of the job; None while it runs, and an error when the process died instead of telling."""
        died = self.process.poll() is not None  # before the look at the connection: it may tell, then die
        try:
            if self.connection.poll():
                outcome: Outcome = self.connection.recv()
                return outcome
        except (EOFError, OSError):  # the end of the connection is the end of the process
            died = True
        if not died:
            return None
        message = f"the rank's process ended with code {self.process.wait()}"
        return Outcome(error=RankError("ProcessDied", message, self.stacks()))

    def output(self) -> str:
        """What the rank wrote to stdout and stderr since the job's start."""
        return self._output.read_text(errors="replace")

    def stacks(self) -> str:
        """The stacks of all threads that `faulthandler` wrote as the process ended by a signal."""
        return self._stacks.read_text().partition("\nExtension modules:")[0]

    def send(self, message: Job | None) -> None:
        """Give the rank a job, or the word that the others need its process group no more."""
        try:
            self.connection.send(message)
        except BrokenPipeError:  # it died between two messages: `outcome` tells, or the next start
            pass

    def close(self) -> None:
        """Forget the process, which was killed."""
        self.process.wait()
        self.connection.close()
        self._folder.cleanup()


def _collect(workers: list[_Worker], timeout_seconds: float) -> dict[int, Outcome]:
    """The outcomes of the ranks that finished in time, in the order in which they came."""
    outcomes: dict[int, Outcome] = {}
    running = dict(enumerate(workers))
    held: list[_Worker] = []  # finished, with their process group still up
    deadline = time.monotonic() + timeout_seconds
    while running and time.monotonic() < deadline:
        # The time-out is there to notice a death: a data loader that outlives its rank keeps the connection open.
        wait([worker.connection for worker in running.values()], timeout=0.1)
        finished = {rank: outcome for rank, worker in running.items() if (outcome := worker.outcome())}
        if any(outcome.error for outcome in finished.values()):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        outcomes |= finished
        held += [running.pop(rank) for rank in finished]
        if not running or any(outcome.error for outcome in outcomes.values()):
            while held:  # as if the processes ended: the collectives of the others break instead of waiting
                held.pop().send(None)
    return outcomes


def _check_importable(function: Callable[..., Any]) -> None:
    """Refuse what another process cannot find by its name."""
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if module and qualname and module != "__main__" and "<" not in qualname and resolve(module, qualname) is function:
        return
    raise TypeError(
        f"run_ranks cannot send {function!r} to other processes: they import the function by its name. Define it with "
        "def at the top of the test's file, and pass what it needs as arguments of run_ranks."
    )


def _as_rank(job: Job, rank: int, world_size: int, port: int) -> Job:
    """The job with the variables that torchrun sets on one node."""
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "ROLE_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "ROLE_WORLD_SIZE": world_size,
        "GROUP_WORLD_SIZE": 1,
        "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_RUN_ID": f"test-{port}",
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    return replace(job, environment=job.environment | {name: str(value) for name, value in variables.items()})


def _report(name: str, errors: dict[int, RankError], stacks: dict[int, str], outputs: list[str]) -> str:
    raised = [f"rank {rank} raised {error.type_name}: {error.message}" for rank, error in errors.items()]
    hung = [f"rank {rank} did not finish in time" for rank in stacks]
    parts = [f"{name}: " + "; ".join(raised + hung)]
    parts += [f"--- rank {rank}: {error.type_name} ---\n{error.traceback}" for rank, error in errors.items()]
    parts += [f"--- rank {rank}: its stacks when it was stopped ---\n{text}" for rank, text in stacks.items()]
    parts += [f"--- rank {rank} wrote ---\n{text}" for rank, text in enumerate(outputs) if text]
    return "\n".join(parts)


def _pool(cuda: bool) -> RankPool:
    if not _pools:
        atexit.register(close_pools)
    return _pools.setdefault(cuda, RankPool(cuda))


_pools: dict[bool, RankPool] = {}
