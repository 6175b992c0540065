"""Folders and files that are being written: how they are named, and the proof that their writer is dead.

A save writes into `.tmp-<name>-<boot>-<pid>-<start>-<token>` beside its place and holds a lock on it, so that
`sweep`, called by the next save there, can remove what a killed one left. It removes only what it can prove dead: the
name carries this very boot of this machine, no process with that number and start time lives, and the kernel grants
the lock. The lock covers containers, whose process numbers mean nothing to each other. Whatever is in doubt stays; it
has no name that counts as a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator

from .storage import Disk, remove_folder

_PREFIX = ".tmp-"
_NAME = re.compile(r"\.tmp-.*-(?P<boot>[0-9a-f]{12})-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{8}", re.DOTALL)


def temporary_name(name: str) -> str:
    """A name that nothing else has, beside `name`."""
    start = _start_time(os.getpid()) or "0"
    return f"{_PREFIX}{name[:40]}-{_boot() or '0' * 12}-{os.getpid()}-{start}-{secrets.token_hex(4)}"


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is something unfinished."""
    return name.startswith(_PREFIX)


class Lock:
    """A lock on a folder or file that ends with the process at the latest; `held` is False where there is none."""

    def __init__(self, path: str) -> None:
        self.held = False
        self._descriptor = os.open(path, os.O_RDONLY)
        with contextlib.suppress(ImportError, OSError):  # no such locks here, or another holds it
            import fcntl

            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.held = True

    def release(self) -> None:
        """Give it up; twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def sweep(disk: Disk, folder: str) -> None:
    """Remove from `folder` what killed saves of this machine left there, as far as that is allowed."""
    names: dict[str, int | None] = {}
    with contextlib.suppress(OSError):
        names = disk.list(folder)
    for name, size in names.items():
        path = disk.join(folder, name)
        with _dead(path, name) as dead, contextlib.suppress(OSError):  # it stays, and harms nothing
            if dead and size is None:
                remove_folder(disk, path)
            elif dead:
                disk.remove(path)


@contextlib.contextmanager
def _dead(path: str, name: str) -> Iterator[bool]:
    """Whether the writer of `path` is proved dead; its lock is held meanwhile."""
    match = _NAME.fullmatch(name)
    if match is None or match["boot"] != _boot() or _start_time(int(match["pid"])) == match["start"]:
        yield False
        return
    try:
        lock = Lock(path)
    except OSError:
        yield False
        return
    try:
        yield lock.held
    finally:
        lock.release()


def _boot() -> str | None:
    """What names this boot of this kernel; None where the system does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().replace("-", "").strip()[:12]
    except OSError:
        return None


def _start_time(pid: int) -> str | None:
    """When the process started, in ticks since boot; None if there is none or the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The command's name, in parentheses, may hold anything; the 20th field after it is the start time.
            return file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return None
