"""`CutOnResume`: a logger whose file a resumed run cuts, so that no point stands in it twice and none is lost.

A checkpoint records how many points were in the file. A step alone would not do: a validation that follows a save has
the same step, and runs again.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from .logger import Logger

if TYPE_CHECKING:
    from ..trainer.module import Module
    from ..trainer.trainer import Trainer


class CutOnResume(Logger):
    """The hooks; the logger says where its file is, how many points it has, and cuts it."""

    _resume_step: int | None = None
    _resume_file: str | None = None
    _resume_points: int | None = None

    @abstractmethod
    def resume_from(self, step: int, points: int | None = None) -> None:
        """Cut what was written after the first `points` points or, where that is None, after update `step`."""

    @property
    @abstractmethod
    def metrics_file_path(self) -> str:
        """The file of points."""

    @abstractmethod
    def _count_points(self) -> int | None:
        """How many points the file has; None where nothing was written."""

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._resume_step = self._resume_file = self._resume_points = None
        super().setup(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        self.save()  # a checkpoint may count only what is safe
        points = self._count_points()
        own = {} if points is None else {"file": self.metrics_file_path, "points": points}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._resume_file, self._resume_points = state_dict.get("file"), state_dict.get("points")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._resume_step = checkpoint.get("global_step")

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self._resume_step is not None and self._writes(trainer):
            same_file = self._resume_file == self.metrics_file_path
            self.resume_from(self._resume_step, self._resume_points if same_file else None)
        super().on_fit_start(trainer, pl_module)
