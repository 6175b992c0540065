"""`SilentLogger`: the logger of a `fast_dev_run`, which takes everything and writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .logger import DummyExperiment, Logger


class SilentLogger(Logger):
    """Stands in for the run's loggers, so that code that uses `self.logger.experiment` works in a trial run too."""

    @property
    def experiment(self) -> DummyExperiment:
        """Swallows every call."""
        return DummyExperiment()

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "on_")) or not name.startswith("log_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return DummyExperiment()  # log_image, log_table and what else some loggers have
