"""`start_ranks`: a plain `python train.py` becomes a job of several ranks by running its own command line again.

Read `start_ranks`, then `_obstacle`: what a process cannot be started again as. The ranks run under torch's elastic
agent (`agent.py`), and this process ends with the job's exit code, so whatever follows in the program runs in the
ranks alone. `sys.orig_argv`, unlike `sys.argv`, has the interpreter's own options too.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..errors import LaunchError

_ended_with: int | None = None


def start_ranks(devices: int, num_nodes: int = 1) -> NoReturn:
    """Run this process's command line in `devices` ranks and end this process with the job's exit code.

    The end is a `SystemExit`, so that `finally` blocks and exit handlers run. Raises `LaunchError` as
    `check_possible` does.
    """
    global _ended_with
    if _ended_with is None:  # else the program caught the SystemExit of the job before, and launches again
        check_possible(devices, num_nodes)
        _return_to_script()
        from .agent import run_ranks

        sys.stdout.flush()  # before the ranks write
        sys.stderr.flush()
        _ended_with = run_ranks([sys.executable, *sys.orig_argv[1:]], devices=devices)
    raise SystemExit(_ended_with)


def check_possible(devices: int, num_nodes: int = 1) -> None:
    """Raise `LaunchError` where this process's command line cannot be run again, saying why and what to do."""
    if obstacle := _obstacle():
        raise LaunchError(
            f"devices={devices} needs {devices} processes, and they cannot be started from here: {obstacle}. "
            "They are made by running this process's command line again. Start a script with "
            f"`torchrun --nproc-per-node {devices} script.py`, or use devices=1."
        )
    if num_nodes > 1:
        words = shlex.join(sys.orig_argv[_program(sys.orig_argv).position :])
        raise LaunchError(
            f"num_nodes={num_nodes}, but this process was started by no launcher, and it can start ranks on its own "
            f"machine only. Run on each node, with R = 0 to {num_nodes - 1} and HOST the address of node 0:\n"
            f"  torchrun --nnodes {num_nodes} --nproc-per-node {devices} --node-rank R --master-addr HOST "
            f"--master-port 29500 {words}\n"
            f"Or use srun with {devices} tasks a node, or num_nodes=1."
        )


def is_possible() -> bool:
    """Whether `start_ranks` could start ranks on this machine from here."""
    return not _obstacle()


def _obstacle() -> str:
    """What keeps this process's command line from being run again; "" if nothing does."""
    if "RANK" in os.environ:
        return f"this process is a rank itself (RANK={os.environ['RANK']})"
    if _is_pytest_running():
        return "pytest is running"
    if multiprocessing.parent_process() is not None:
        return "multiprocessing started this process"
    if threading.current_thread() is not threading.main_thread():
        return f"the thread {threading.current_thread().name!r} is not the main thread"
    if _is_ipython_running():
        return "this is a notebook or an IPython shell"
    program = _program(sys.orig_argv)
    if hasattr(sys, "ps1") or sys.flags.interactive:
        return "this is an interactive session"
    if program.kind == "-c":
        return "the code was given with `python -c`"
    if program.kind == "stdin":
        return "the code was read from standard input"
    if not sys.executable or (program.kind == "script" and _folder_of_script(program) is None):
        return f"the command line {shlex.join(sys.orig_argv)!r} does not lead to the program that runs"
    return ""


def _is_pytest_running() -> bool:
    """True inside pytest; a script that a test started inherits the variable, but imports no pytest."""
    if "pytest" not in sys.modules:
        return False
    return "PYTEST_CURRENT_TEST" in os.environ or Path(_program(sys.orig_argv).name).name in {"pytest", "py.test"}


def _is_ipython_running() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


@dataclass(frozen=True)
class _Program:
    """What an interpreter was told to run: "script" (name: its path), "-m" (a module), "-c", or "stdin"."""

    kind: str
    name: str
    position: int
    """Where it begins in the command line; the interpreter's own options stand before it."""


def _program(command_line: Sequence[str]) -> _Program:
    """Find the program in a command line as the interpreter does (`python --help`); the first word is not looked at."""
    position = 1
    while position < len(command_line):
        word = command_line[position]
        following = command_line[position + 1] if position + 1 < len(command_line) else ""
        if word == "-":
            break
        if word == "--":
            return _Program("script", following, position + 1)
        if not word.startswith("-"):
            return _Program("script", word, position)
        taken = 2 if word == "--check-hash-based-pycs" else 1
        letters = "" if word.startswith("--") else word[1:]
        for index, letter in enumerate(letters):
            rest = letters[index + 1 :]
            if letter in "cm":
                return _Program(f"-{letter}", rest or following, position)
            if letter in "WX":  # the value is the rest of the word, or the next word
                taken = 1 if rest else 2
                break
        position += taken
    return _Program("stdin", "", position)


def _return_to_script() -> None:
    """Go back to the folder that the command line was written for, where the program has left it."""
    program = _program(sys.orig_argv)
    folder = _folder_of_script(program) if program.kind == "script" else None
    if folder is not None:
        os.chdir(folder)


def _folder_of_script(program: _Program) -> Path | None:
    """The folder from where the script's path leads to it: the current one, or the shell's; None if neither does."""
    folders = [Path.cwd(), Path(os.environ.get("PWD", "."))]
    found = [folder for folder in folders if (folder / program.name).exists()]
    running = getattr(sys.modules["__main__"], "__file__", None)
    if running and os.path.exists(running) and not os.path.isabs(program.name) and os.path.isfile(program.name):
        return next((folder for folder in found if os.path.samefile(folder / program.name, running)), None)
    return found[0] if found else None
