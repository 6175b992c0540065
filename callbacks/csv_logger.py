"""`CSVLogger`: `metrics.csv`, a row a point and a column a metric; the header grows with the metrics."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from typing import Any

from ..trainer.argument_types import checked_types
from ..trainer.arguments import check_count
from ..trainer.rank_zero import rank_zero_only
from .cut_on_resume import CutOnResume
from .folder_logger import FolderLogger
from .log_file import LogFile, join, open_log_file, write_text
from .log_values import add_prefix, as_yaml, hparams_dict, plain_number
from .logger import rank_zero_experiment


class CSVLogger(CutOnResume, FolderLogger):
    """Writes `metrics.csv` and `hparams.yaml` into `<save_dir>/<name>/version_N`, or without `save_dir` into the run's.

    Rows wait in memory until `flush_logs_every_n_steps` updates have passed since the last write, or a checkpoint or
    the end comes. A new metric rewrites the file with one column more. A resumed run cuts what came after the save.
    """

    @checked_types
    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version, prefix)
        self._flush_every = check_count("flush_logs_every_n_steps", flush_logs_every_n_steps)
        self._writer: CSVWriter | None = None
        self._last_flush = 0

    @property
    def metrics_file_path(self) -> str:
        return join(self.log_dir, "metrics.csv")

    @property
    @rank_zero_experiment
    def experiment(self) -> CSVWriter:
        """The writer of the file: `log_metrics(metrics, step)`, `log_hparams(params)`, `save()`."""
        if self._writer is None or self._writer.log_dir != self.log_dir:
            self._writer = CSVWriter(self.log_dir)
        return self._writer

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.experiment.log_metrics(add_prefix(metrics, self._prefix), step)
        if step is None or not 0 <= step - self._last_flush < self._flush_every:
            self._last_flush = step or 0
            self.experiment.flush()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.experiment.log_hparams(hparams_dict(params))

    @rank_zero_only
    def save(self) -> None:
        if self._writer is not None:
            self._writer.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def resume_from(self, step: int, points: int | None = None) -> None:
        self.experiment.cut(step, points)
        self._last_flush = step

    def _count_points(self) -> int | None:
        return None if self._writer is None else self._writer.count


class CSVWriter:
    """The file: columns as they came, `step`, `epoch` and `samples` first."""

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self.metrics_file_path = join(log_dir, "metrics.csv")
        self.hparams: dict[str, Any] = {}
        self._file: LogFile | None = None
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []

    @property
    def count(self) -> int:
        """The rows in the file."""
        return max(0, self._opened().count - 1)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Keep a row for the next `flush`; without a `step` it carries its own number."""
        step = self.count + len(self._rows) if step is None else step
        row = {"step": step} | {name: plain_number(value) for name, value in metrics.items()}
        self._rows.append(row)

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Write `hparams.yaml` anew, with `params` added."""
        self.hparams.update(params)
        write_text(join(self.log_dir, "hparams.yaml"), as_yaml(self.hparams))

    def flush(self) -> None:
        """Hand the rows that wait to the system."""
        if not self._rows:
            return
        file = self._opened()
        new = [name for name in dict.fromkeys(name for row in self._rows for name in row) if name not in self._columns]
        if new:
            self._widen(file, new)
        for row in self._rows:
            file.append(_line([row.get(name, "") for name in self._columns]))
        self._rows = []
        file.flush()

    def save(self) -> None:
        """Make all rows durable."""
        self.flush()
        if self._file is not None:
            self._file.save()

    def cut(self, step: int, rows: int | None) -> None:
        """Keep the first `rows` rows or, where that is None, those up to `step`."""
        file = self._opened()
        header, *lines = file.lines() or [""]
        kept = lines[:rows] if rows is not None else [line for line in lines if self._step_of(line) <= step]
        if len(kept) < len(lines):
            file.rewrite([header, *kept])

    def close(self) -> None:
        """Save, and let go of the file."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> LogFile:
        if self._file is None:
            self._file = open_log_file(self.metrics_file_path)
            lines = self._file.lines()
            self._columns = next(csv.reader(lines[:1]), [])
        return self._file

    def _widen(self, file: LogFile, new: list[str]) -> None:
        first = [name for name in ("step", "epoch", "samples") if name in new]
        old = self._columns
        self._columns = [*old, *first, *(name for name in new if name not in first)]
        rows = csv.reader(file.lines()[1:])
        missing = [""] * (len(self._columns) - len(old))
        file.rewrite([_line(self._columns), *(_line(row + missing) for row in rows)])

    def _step_of(self, line: str) -> float:
        cell = dict(zip(self._columns, next(csv.reader([line])), strict=False)).get("step")
        return float(cell) if cell else -1


def _line(cells: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue().replace("\n", " ")  # a row is a line
