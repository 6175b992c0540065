"""`JSONLLogger`, the default: a line of JSON a point, in `metrics.jsonl` of the run's folder.

`pandas.read_json(path, lines=True)` reads it. A killed process loses no point: each is handed to the system at once.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from ..trainer.argument_types import checked_types
from ..trainer.rank_zero import rank_zero_only
from .cut_on_resume import CutOnResume
from .folder_logger import run_version
from .log_file import LogFile, join, open_log_file, write_text
from .log_values import hparams_dict, jsonable, plain_number

if TYPE_CHECKING:
    from ..trainer.module import Module
    from ..trainer.trainer import Trainer


class JSONLLogger(CutOnResume):
    """Writes `metrics.jsonl` and `hparams.json` into `save_dir`, by default the trainer's `log_dir`.

    A point is an object with `step` (updates finished), `epoch`, `samples`, `time` (seconds since 1970), then the
    metrics. NaN and the infinities, which JSON lacks, are the strings "NaN", "Infinity" and "-Infinity"; Python's
    `float()` takes them back. A resumed run goes on after the points that its checkpoint knew of: later ones are cut.
    """

    @checked_types
    def __init__(self, save_dir: str | os.PathLike[str] | None = None) -> None:
        self._given_dir = None if save_dir is None else os.fspath(save_dir)
        self._file: LogFile | None = None
        self._hparams: dict[str, Any] = {}

    @property
    def save_dir(self) -> str | None:
        return self._given_dir or self._run_dir

    @property
    def version(self) -> int | str | None:
        return run_version(self.save_dir)

    @property
    def metrics_file_path(self) -> str:
        """The file of points; before a run only where a `save_dir` was given."""
        return join(self._folder(), "metrics.jsonl")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        values = {name: plain_number(value) for name, value in metrics.items()}
        first: dict[str, Any] = {name: values[name] for name in ("epoch", "samples") if name in values}
        point: dict[str, Any] = {"step": step, **first, "time": round(time.time(), 3), **values}
        file = self._open()
        file.append(json_line(point))
        file.flush()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._hparams |= hparams_dict(params)
        write_text(join(self._folder(), "hparams.json"), json.dumps(jsonable(self._hparams), indent=2) + "\n")

    @rank_zero_only
    def save(self) -> None:
        if self._file is not None:
            self._file.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._close()

    def resume_from(self, step: int, points: int | None = None) -> None:
        file = self._open()
        lines = file.lines()
        kept = lines[:points] if points is not None else [line for line in lines if step_of(line) <= step]
        if len(kept) < len(lines):
            file.rewrite(kept)

    @property
    def state_key(self) -> str:
        return "JSONLLogger" if self._given_dir is None else f"JSONLLogger{{'save_dir': {self._given_dir!r}}}"

    # --- hooks ---------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if self._run_dir != trainer.log_dir and self._given_dir is None:
            self._close()
            self._hparams = {}
        super().setup(trainer, pl_module, stage)

    def _count_points(self) -> int | None:
        return None if self._file is None else self._file.count

    def _folder(self) -> str:
        if self.save_dir is None:
            raise ConfigurationError(
                "JSONLLogger writes to the trainer's log_dir, and belongs to no trainer yet. Log after fit began, or "
                "give JSONLLogger(save_dir=...)."
            )
        return self.save_dir

    def _open(self) -> LogFile:
        if self._file is None:
            self._file = open_log_file(self.metrics_file_path)
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def json_line(point: Mapping[str, Any]) -> str:
    """`point` as one line of valid JSON."""
    try:
        return json.dumps(point, allow_nan=False)
    except (ValueError, TypeError):  # a float that JSON lacks; a value of another type
        return json.dumps(jsonable(point))


def step_of(line: str) -> float:
    """The step of a written point; -1 where it has none, so that cutting keeps it."""
    try:
        step = json.loads(line).get("step")
    except (ValueError, AttributeError):
        return float("inf")  # no line of ours
    return -1 if step is None else float(step)
