"""`OnExceptionCheckpoint`: a checkpoint of where an exception ended training."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from ..trainer.argument_types import checked_types
from ..trainer.callback import Callback
from ..trainer.rank_zero import rank_zero_info, rank_zero_warn
from .log_file import join

if TYPE_CHECKING:
    from ..trainer.module import Module
    from ..trainer.trainer import Trainer


class OnExceptionCheckpoint(Callback):
    """Saves `<dirpath>/<filename>.ckpt` when an exception (Ctrl-C too) ends `fit`; a taken name gets `-v1`.

    On several ranks nothing is saved: a save needs all of them, and the others may still be training.
    """

    FILE_EXTENSION = ".ckpt"

    @checked_types
    def __init__(self, dirpath: str | os.PathLike[str], filename: str = "on_exception") -> None:
        if not filename or "/" in filename:
            raise ConfigurationError(f"OnExceptionCheckpoint(filename={filename!r}): expected a plain name.")
        self.dirpath = os.fspath(dirpath)
        self.filename = filename
        self._training = False

    @property
    def ckpt_path(self) -> str:
        """Where the checkpoint goes if the name is free."""
        return join(self.dirpath, self.filename + self.FILE_EXTENSION)

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._training = False

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._training = True

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        if not self._training:
            return
        if trainer.world_size > 1:
            rank_zero_warn("OnExceptionCheckpoint: nothing was saved, since other ranks may still be training.")
            return
        path = trainer.save_checkpoint(self.ckpt_path)
        rank_zero_info(f"{type(exception).__name__} was raised ({exception}): saved {path}.")
