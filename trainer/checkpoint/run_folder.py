"""`version_N`: the folder of one run under the root, claimed so that two runs never share one."""

from __future__ import annotations

from .storage import Disk, storage_of

_PREFIX = "version_"


def claim_version_folder(root: str) -> str:
    """Make and return the next free `version_N` of `root` (a path or a URL); called on one rank."""
    storage, place = storage_of(root)
    try:
        names = storage.list(place)
    except (FileNotFoundError, NotADirectoryError):
        names = {}
    taken = [int(name[len(_PREFIX) :]) for name in names if name.startswith(_PREFIX) and name[len(_PREFIX) :].isdigit()]
    number = max(taken, default=-1) + 1
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
