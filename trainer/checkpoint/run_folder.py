"""`version_N`: the folder of one run under the root, claimed so that two runs never share one."""

from __future__ import annotations

import contextlib
import os
import socket

from ...errors import CheckpointError
from .storage import Disk, Storage, reading, storage_of

_PREFIX = "version_"
_LOCK = ".in-use"


class FolderLock:
    """Holds a run's folder on a disk while the run lives; CheckpointError if another living run does.

    A POSIX record lock: the kernel gives it up with the process, and a data worker that outlives it does not keep it.
    Where there are no such locks, and on object stores, nothing is held.
    """

    def __init__(self, folder: str) -> None:
        self._descriptor = -1
        storage, place = storage_of(folder)
        if not isinstance(storage, Disk):
            return
        try:
            import fcntl
        except ImportError:
            return
        storage.make_folder(place)
        self._descriptor = os.open(storage.join(place, _LOCK), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.pread(self._descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            self.release()
            raise CheckpointError(
                f"{place} is in use by a run that is alive ({holder}). Wait for its end or stop it, or start this run "
                "in a folder of its own: without ckpt_path='auto', or with another default_root_dir."
            ) from None
        except OSError:  # a file system without locks
            self.release()
            return
        os.truncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Give it up; twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def claim_version_folder(root: str) -> str:
    """Make and return the next free `version_N` of `root` (a path or a URL); called on one rank."""
    storage, place = storage_of(root)
    number = next_version(root)
    while True:
        folder = storage.join(place, f"{_PREFIX}{number}")
        if not isinstance(storage, Disk):
            return folder
        storage.make_folder(place)
        try:
            storage.make_new_folder(folder)
        except FileExistsError:
            number += 1
            continue
        return folder


def next_version(root: str) -> int:
    """One more than the greatest N of the `version_N` in `root`, which need not exist."""
    return max(_taken(*storage_of(root)), default=-1) + 1


def version_folders(root: str) -> list[str]:
    """The `version_N` of `root`, the newest first."""
    storage, place = storage_of(root)
    return [storage.join(place, f"{_PREFIX}{number}") for number in sorted(_taken(storage, place), reverse=True)]


def _taken(storage: Storage, root: str) -> list[int]:
    """The numbers of the version folders that there are."""
    names: dict[str, int | None] = {}
    with reading(root), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = storage.list(root)
    return [int(name[len(_PREFIX) :]) for name in names if name.startswith(_PREFIX) and name[len(_PREFIX) :].isdigit()]


def version_folder_of(path: str, root: str) -> str | None:
    """The `version_N` of `root` that holds the checkpoint `path`; None if it lies elsewhere."""
    storage, place = storage_of(root)
    _, path = storage_of(path)
    while path and path != place:
        parent, name = storage.split(path)
        if parent == path:
            return None
        if parent == place:
            return path if name.startswith(_PREFIX) else None
        path = parent
    return None
