"""`RichProgressBar`: the same as `TQDMProgressBar`, drawn by rich; `progress_bar.py` says when."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..trainer.argument_types import checked_types
from .progress_bar import ProgressBar, Stage, clock

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, TaskID

    from ..trainer.trainer import Trainer

_WIDE = 80  # columns of a terminal that has room for a bar
_BAR_WIDTH = 10  # the least room that a bar gets


@dataclass
class RichProgressBarTheme:
    """rich's styles for the parts of the bar; `metrics_text_delimiter` and `metrics_format` write the metrics."""

    description: str = ""
    progress_bar: str = "#6206E0"
    progress_bar_finished: str = "#6206E0"
    progress_bar_pulse: str = "#6206E0"
    batch_progress: str = ""
    time: str = "dim"
    processing_speed: str = "dim underline"
    metrics: str = "italic"
    metrics_text_delimiter: str = " "
    metrics_format: str = ".3f"


class RichProgressBar(ProgressBar):
    """Epoch, batches, speed, time left and what was logged with `prog_bar=True`; validation below training.

    `refresh_rate` as in TQDMProgressBar; `leave` keeps the bar of each epoch; `console_kwargs` go to rich's `Console`.
    Override `configure_columns` for columns of your own. Where the console is no terminal, an epoch or a validation
    ends with one plain line.
    """

    @checked_types
    def __init__(
        self,
        refresh_rate: int = 1,
        leave: bool = False,
        theme: RichProgressBarTheme | None = None,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(refresh_rate, leave)
        self.theme = theme or RichProgressBarTheme()
        self._console_kwargs = console_kwargs or {}
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    @property
    def progress(self) -> Progress | None:
        """rich's display, while something is shown."""
        return self._progress

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """The columns; a task has the fields `batches`, `clock`, `speed` and `metrics`, which are texts."""
        from rich.progress import BarColumn, TextColumn
        from rich.table import Column

        theme = self.theme

        def text(source: str, style: str, **column: Any) -> TextColumn:
            options: dict[str, Any] = {"no_wrap": True} | column
            return TextColumn(f"{{task.{source}}}", style or "none", markup=False, table_column=Column(**options))

        numbers = [
            text("fields[batches]", theme.batch_progress),
            text("fields[clock]", theme.time),
            text("fields[speed]", theme.processing_speed),
        ]
        if self._new_console().width < _WIDE:  # no room for a bar: the metrics get what the texts leave
            return [text("description", theme.description), *numbers, text("fields[metrics]", theme.metrics, ratio=1)]
        bar = BarColumn(
            bar_width=None,
            complete_style=theme.progress_bar,
            finished_style=theme.progress_bar_finished,
            pulse_style=theme.progress_bar_pulse,
            table_column=Column(ratio=1, no_wrap=True, min_width=_BAR_WIDTH),
        )
        metrics = text("fields[metrics]", theme.metrics, no_wrap=False, overflow="fold")  # gives way, by more lines
        return [text("description", theme.description), bar, *numbers, metrics]

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._progress is None:
            print(*args, **kwargs)
        else:
            self._progress.console.print(*args, **kwargs)

    # --- what the base asks for --------------------------------------------------------------------------------------
    def _is_terminal(self) -> bool:
        console = self._new_console()
        return console.is_terminal or console.is_jupyter

    def _new_console(self) -> Console:
        from rich.console import Console

        return Console(**self._console_kwargs)

    def _open(self, stage: Stage) -> None:
        if not self._terminal:
            return
        if self._progress is None:
            from rich.progress import Progress

            columns = self.configure_columns(self.trainer)
            self._progress = Progress(*columns, console=self._new_console(), auto_refresh=False, expand=True)
            self._progress.start()
        self._epoch_drawn = ""
        self._tasks[stage.kind] = self._add_task(self._progress, stage)

    def _add_task(self, progress: Progress, stage: Stage) -> TaskID:
        fields: dict[str, Any] = dict(_texts(stage))
        return progress.add_task(stage.description, total=_total(stage), metrics="", **fields)

    def _draw(self, stage: Stage, metrics: dict[str, Any] | None) -> None:
        if self._progress is None:
            return
        if self._leaves_epoch(stage):
            self._tasks["train"] = self._add_task(self._progress, stage)
        fields: dict[str, Any] = dict(_texts(stage))
        if metrics is not None:
            fields["metrics"] = self._metrics_text(metrics)
        self._progress.update(
            self._tasks[stage.kind],
            description=stage.description,
            completed=stage.n,
            total=_total(stage),
            **fields,
        )
        self._progress.refresh()

    def _metrics_text(self, metrics: dict[str, Any]) -> str:
        theme = self.theme
        shown = ((name, format(v, theme.metrics_format) if isinstance(v, float) else v) for name, v in metrics.items())
        return theme.metrics_text_delimiter.join(f"{name}: {value}" for name, value in shown)

    def _close(self, stage: Stage) -> None:
        if self._progress is None:
            return
        if stage.kind in ("sanity", "validation") and (self._train is not None or stage.kind == "sanity"):
            self._progress.remove_task(self._tasks.pop(stage.kind))
            self._progress.refresh()
        if stage.kind == "train" or self._train is None:
            self._progress.stop()
            self._progress = None
            self._tasks = {}


def _total(stage: Stage) -> float | None:
    return None if stage.total == math.inf else stage.total


def _texts(stage: Stage) -> dict[str, str]:
    """The fields of `configure_columns`, but the metrics."""
    elapsed, done = time.monotonic() - stage.started, stage.n - stage.first
    left = clock((stage.total - stage.n) * elapsed / done) if done > 0 and stage.total < math.inf else "-:--"
    return {
        "batches": f"{stage.n}/{stage.total if stage.total < math.inf else '--'}",
        "clock": f"{clock(elapsed)} • {left}",
        "speed": f"{done / elapsed if elapsed > 0 else 0:.2f}it/s",
    }
