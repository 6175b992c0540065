"""Which folders are checkpoints, and which of them is the newest that is whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from ...errors import CheckpointError
from .load import verify
from .manifest import Manifest, manifest_in
from .pointer import SUFFIX, resolve_pointer
from .storage import reading, storage_of


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder with a valid manifest (no pointer); its other files are not looked at."""
    try:
        manifest_in(*storage_of(path))
    except CheckpointError:
        return False
    return True


def find_newest(
    folders: Iterable[str | os.PathLike[str]], to_resume: bool = False
) -> tuple[str | None, list[tuple[str, str]]]:
    """The newest whole checkpoint in `folders`, and those passed over, each with the reason.

    Newest is the greatest `global_step`, then the latest manifest; each is read entirely before it is called whole
    (`verify`). `to_resume`: weights alone do not count. A folder that does not exist is empty; CheckpointError if one
    cannot be listed.
    """
    candidates, skipped = _candidates(folders)
    for path, manifest in sorted(candidates, key=lambda found: (found[1].global_step, found[1].time), reverse=True):
        weights_alone = to_resume and manifest.meta.get("weights_only")
        problems = ["it holds weights only, from which no run can go on"] if weights_alone else verify(path)
        if not problems:
            return path, skipped
        skipped.append((path, problems[0]))
    return None, skipped


def _candidates(folders: Iterable[str | os.PathLike[str]]) -> tuple[list[tuple[str, Manifest]], list[tuple[str, str]]]:
    candidates, skipped = [], []
    for folder in folders:
        storage, place = storage_of(folder)
        names: dict[str, int | None] = {}
        with reading(place), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            names = storage.list(place)  # a store that is gone for the moment is an error, no reason to start afresh
        for name in sorted(name for name in names if name.endswith(SUFFIX)):
            path = storage.join(place, name)
            try:
                if names[name] is not None:
                    # Lists of object stores may lag: what a pointer names is there, listed or not.
                    path = resolve_pointer(path)
                    if storage.split(path)[1] in names:
                        continue
                candidates.append((path, manifest_in(storage, path)))
            except CheckpointError as error:
                skipped.append((path, str(error)))
    return candidates, skipped
