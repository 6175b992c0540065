"""`FolderLogger`: a logger with a folder `<save_dir>/<name>/version_N` of its own, as its users know it.

The number is chosen on rank 0 and taken up again by a run that is resumed in its own folder.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from ..trainer.argument_types import checked_types
from ..trainer.checkpoint.run_folder import next_version
from .log_file import join
from .logger import Logger

if TYPE_CHECKING:
    from ..trainer.module import Module
    from ..trainer.trainer import Trainer

_VERSION = re.compile(r"version_(\d+)")


class FolderLogger(Logger):
    """Without `save_dir` it writes to the trainer's `log_dir`; `version` is a number, or a name used as it is."""

    @checked_types
    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
    ) -> None:
        self._save_dir = None if save_dir is None else os.fspath(save_dir)
        self._name = name or ""
        self._version = self._given_version = version
        self._prefix = prefix

    @property
    def name(self) -> str:
        return self._name

    @property
    def save_dir(self) -> str | None:
        return self._save_dir or self._run_dir

    @property
    def root_dir(self) -> str | None:
        if self._save_dir is None:
            return self._run_dir
        return join(self._save_dir, self._name) if self._name else self._save_dir

    @property
    def version(self) -> int | str:
        if self._version is None:
            found = run_version(self._run_dir) if self._save_dir is None else None
            self._version = next_version(self.root_dir or ".") if found is None else found
        return self._version

    @property
    def log_dir(self) -> str:
        if self._save_dir is None:
            return self._run_dir or "."
        return join(self.root_dir or ".", version_folder(self.version))

    @property
    def state_key(self) -> str:
        given = f"'save_dir': {self._save_dir!r}, 'name': {self._name!r}, 'version': {self._given_version!r}"
        return f"{type(self).__qualname__}{{{given}}}"

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._version = trainer.strategy.broadcast_object(self.version)

    def state_dict(self) -> dict[str, Any]:
        return {"version": self._version, "run_dir": self._run_dir}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Where the trainer goes on in the run's own folder, so does the log; elsewhere it is another run's.
        if self._given_version is None and state_dict.get("run_dir") == self._run_dir:
            self._version = state_dict["version"]


def version_folder(version: int | str) -> str:
    """`3` → `version_3`; a name stays as it is."""
    return version if isinstance(version, str) else f"version_{version}"


def run_version(folder: str | None) -> int | str | None:
    """The number of a folder `.../version_N`; the name of any other folder."""
    if not folder:
        return None
    name = re.split(r"[/\\]", folder.rstrip("/\\"))[-1]
    match = _VERSION.fullmatch(name)
    return int(match.group(1)) if match else name
