"""`run_script`: run a script as its user would, in fresh processes, with a time limit and nothing left behind.

    result = run_script("import os; print(os.environ['RANK'])", launcher="torchrun", nproc=2)
    assert result.returncode == 0, result.stderr

`start_script` is the same while the script runs: wait for a line of its output, press Ctrl-C. `run_command` and
`start_command` take any command line. Past the time limit all Python processes of the script write their stacks to
stderr, which is in the error's message, and are killed, with whatever else they started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from .processes import abort_processes, kill_processes, marked, new_marker, processes_of, wait_until_gone

Environment = Mapping[str, str | None]
"""Variables to set; None takes one out of the environment of this process."""

Launcher = Literal["torchrun"]


@dataclass(frozen=True)
class ScriptResult:
    """A script that has ended; `left_behind` lists the processes that it started and that outlived it."""

    returncode: int
    stdout: str
    stderr: str
    left_behind: list[str]


class ScriptTimedOut(Exception):
    """A script did not do in time what was waited for; the message has its output and its processes' stacks."""

    def __init__(self, what: str, stdout: str, stderr: str) -> None:
        self.stdout, self.stderr = stdout, stderr
        super().__init__(f"{what}\n--- stdout ---\n{stdout}\n--- stderr ---\n{stderr}")


class RunningScript:
    """A script that runs; made by `start_script` and `start_command`."""

    def __init__(self, command: list[str], env: Environment | None, cuda: bool, timeout_seconds: float) -> None:
        self._command, self._timeout_seconds = command, timeout_seconds
        self._deadline = time.monotonic() + timeout_seconds
        self._marker = new_marker()
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-script-")
        self._stdout, self._stderr = Path(self._folder.name, "stdout"), Path(self._folder.name, "stderr")
        # Files and not pipes: a full pipe stops its writer, and a process that is left behind keeps a pipe open.
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                env=marked(_script_environment(env or {}, cuda), self._marker),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process that was started: the script, or its launcher."""
        return self._process.pid

    @property
    def stdout(self) -> str:
        """What was written to stdout so far."""
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What was written to stderr so far."""
        return self._stderr.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All processes of the script that are alive: itself, its ranks, their data loaders' workers."""
        return processes_of(self._marker)

    def wait_for_output(self, text: str) -> None:
        """Wait until the script has written `text` to stdout or stderr."""
        while True:
            ended = self._process.poll() is not None
            if text in self.stdout or text in self.stderr:
                return
            if ended:
                raise self._timed_out(f"ended with code {self._process.returncode} and never wrote {text!r}")
            if time.monotonic() > self._deadline:
                abort_processes(self._marker)
                raise self._timed_out(f"did not write {text!r} within {self._timeout_seconds} s")
            time.sleep(0.05)

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        """Signal the script's process group, as the terminal does on Ctrl-C; ranks under torch's agent have others."""
        os.killpg(self.pid, number)

    def wait(self, gone_seconds: float = 3.0) -> ScriptResult:
        """Wait for the script's end; what it started is left behind if it outlives it by `gone_seconds`."""
        try:
            returncode = self._process.wait(max(self._deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            abort_processes(self._marker)
            raise self._timed_out(f"did not end within {self._timeout_seconds} s") from None
        left_behind = [_describe(process) for process in wait_until_gone(self._marker, gone_seconds)]
        return ScriptResult(returncode, self.stdout, self.stderr, left_behind)

    def close(self) -> None:
        """Kill what is alive and remove the files of the output."""
        kill_processes(self._marker)
        self._process.wait()
        self._folder.cleanup()

    def _timed_out(self, what: str) -> ScriptTimedOut:
        return ScriptTimedOut(f"{' '.join(self._command)} {what}.", self.stdout, self.stderr)


def run_script(
    script: Path | str,
    *argv: object,
    env: Environment | None = None,
    timeout_seconds: float = 120.0,
    launcher: Launcher | None = None,
    nproc: int = 2,
    cuda: bool = False,
) -> ScriptResult:
    """Run a script's file (a `Path`) or source (a `str`, written to `script.py` in the current folder) to its end.

    With `launcher="torchrun"` it runs on `nproc` ranks. It sees GPUs only with `cuda=True`. Raises `ScriptTimedOut`.
    """
    command = _script_command(script, argv, launcher, nproc)
    return run_command(*command, env=env, timeout_seconds=timeout_seconds, cuda=cuda)


def run_command(
    *command: object, env: Environment | None = None, timeout_seconds: float = 120.0, cuda: bool = False
) -> ScriptResult:
    """Run a command line to its end. Raises `ScriptTimedOut`.

    The program is looked for beside this interpreter first: "python", "torchrun", "paceline" are those of the tests.
    """
    with start_command(*command, env=env, timeout_seconds=timeout_seconds, cuda=cuda) as running:
        return running.wait()


@contextmanager
def start_script(
    script: Path | str,
    *argv: object,
    env: Environment | None = None,
    timeout_seconds: float = 120.0,
    launcher: Launcher | None = None,
    nproc: int = 2,
    cuda: bool = False,
) -> Iterator[RunningScript]:
    """`run_script`, but the body runs beside the script; when it ends, everything of the script is killed."""
    command = _script_command(script, argv, launcher, nproc)
    with start_command(*command, env=env, timeout_seconds=timeout_seconds, cuda=cuda) as running:
        yield running


@contextmanager
def start_command(
    *command: object, env: Environment | None = None, timeout_seconds: float = 120.0, cuda: bool = False
) -> Iterator[RunningScript]:
    """`run_command`, but the body runs beside the command; when it ends, everything of the command is killed."""
    program, *words = map(str, command)
    beside = Path(sys.executable).parent / program  # an absolute path stays itself
    running = RunningScript([str(beside) if beside.exists() else program, *words], env, cuda, timeout_seconds)
    try:
        yield running
    finally:
        running.close()


def _script_command(script: Path | str, argv: tuple[object, ...], launcher: Launcher | None, nproc: int) -> list[str]:
    if isinstance(script, str):
        source, script = script, Path.cwd() / "script.py"
        script.write_text(textwrap.dedent(source))
    words = [str(script), *map(str, argv)]
    if launcher is None:
        return [sys.executable, *words]
    # --local-addr: without it torch asks for this machine's name, which need not resolve.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return [*torchrun, f"--nproc-per-node={nproc}", *words]


def _script_environment(changes: Environment, cuda: bool) -> dict[str, str]:
    """This process's environment with the changes; Python processes in it answer SIGABRT with their stacks."""
    environment: dict[str, str | None] = {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    if not cuda:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    environment.update(changes)
    return {name: value for name, value in environment.items() if value is not None}


def _describe(process: psutil.Process) -> str:
    with process.oneshot():
        try:
            return f"{process.pid}: {' '.join(process.cmdline())}"
        except psutil.Error:
            return f"{process.pid}: ended meanwhile"
