"""`TQDMProgressBar`, the default bar: tqdm draws, `progress_bar.py` says when."""

from __future__ import annotations

import functools
import math
import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..trainer.argument_types import checked_types
from .progress_bar import ProgressBar, Stage

if TYPE_CHECKING:
    from tqdm import tqdm

_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


def _bar(kind: str) -> Any:
    """The bar of `kind`, once it is there."""

    def bar(self: TQDMProgressBar) -> tqdm[Any]:
        if kind not in self._bars:
            raise TypeError(f"The {kind} progress bar of `{type(self).__name__}` is not there yet.")
        return self._bars[kind]

    return property(bar)


class TQDMProgressBar(ProgressBar):
    """Epoch, batches, speed, time left and what was logged with `prog_bar=True`; validation below training.

    Drawn at most ten times a second, and only after whole multiples of `refresh_rate` batches (0: not at all).
    `process_position` moves the bars that many lines down, `leave` keeps the bar of each epoch. Where standard output
    is no terminal, an epoch or a validation ends with one plain line. Override `init_train_tqdm` and its like for bars
    of your own, `get_metrics` for other metrics.
    """

    BAR_FORMAT = _FORMAT

    @checked_types
    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__(refresh_rate, leave)
        self.process_position = process_position
        self._bars: dict[str, tqdm[Any]] = {}

    # --- the bars, for users to override ---------------------------------------------------------------------------
    def init_sanity_tqdm(self) -> tqdm[Any]:
        """The bar of the sanity check."""
        return self._new_bar(self.sanity_check_description, nested=False)

    def init_train_tqdm(self) -> tqdm[Any]:
        """The bar of training."""
        return self._new_bar(self.train_description, nested=False, leave=True)

    def init_validation_tqdm(self) -> tqdm[Any]:
        """The bar of validation; below that of training in `fit`."""
        nested = self.trainer.state.fn != "validate"
        return self._new_bar(self.validation_description, nested, leave=not nested)

    def init_test_tqdm(self) -> tqdm[Any]:
        """The bar of testing."""
        return self._new_bar(self.test_description, nested=False, leave=True)

    def init_predict_tqdm(self) -> tqdm[Any]:
        """The bar of predicting."""
        return self._new_bar(self.predict_description, nested=False, leave=True)

    def _new_bar(self, description: str, nested: bool, leave: bool = False) -> tqdm[Any]:
        bar: tqdm[Any] = bar_class()(
            desc=description,
            position=2 * self.process_position + nested,
            disable=self.is_disabled or not self._terminal,
            leave=leave,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )
        return bar

    train_progress_bar: tqdm[Any] = _bar("train")
    val_progress_bar: tqdm[Any] = _bar("validation")  # or of the sanity check
    test_progress_bar: tqdm[Any] = _bar("test")
    predict_progress_bar: tqdm[Any] = _bar("predict")

    def print(self, *args: Any, sep: str = " ", end: str = "\n", **kwargs: Any) -> None:
        if not self._terminal or (self._train is None and self._nested is None):
            print(*args, sep=sep, end=end, **kwargs)
        else:
            bar_class().write(sep.join(map(str, args)), file=kwargs.get("file") or sys.stdout, end=end)

    # --- what the base asks for --------------------------------------------------------------------------------------
    def _open(self, stage: Stage) -> None:
        self._bars[_place(stage)] = getattr(self, f"init_{stage.kind}_tqdm")()
        self._epoch_drawn = ""

    def _draw(self, stage: Stage, metrics: dict[str, Any] | None) -> None:
        bar = self._bars[_place(stage)]
        if self._leaves_epoch(stage):
            bar.close()
            bar = self._bars["train"] = self.init_train_tqdm()
        bar.last_print_t = time.time()  # a bar that seems never to have been printed would not be cleared
        bar.start_t = bar.last_print_t - (time.monotonic() - stage.started)
        bar.n, bar.initial = stage.n, stage.first
        bar.total = None if stage.total == math.inf else int(stage.total)
        bar.set_description(stage.description, refresh=False)
        if metrics is not None:
            bar.set_postfix(metrics, refresh=False)
        bar.refresh()

    def _close(self, stage: Stage) -> None:
        self._bars[_place(stage)].close()


def _place(stage: Stage) -> str:
    return "validation" if stage.kind == "sanity" else stage.kind


@functools.cache
def bar_class() -> Any:
    """tqdm's class for where we are, without its thread: we say when to draw."""
    # tqdm.auto knows notebooks, and costs an import of asyncio.
    base: Any = import_module("tqdm.auto" if "ipykernel" in sys.modules else "tqdm.std").tqdm

    class Bar(base):  # type: ignore[misc]
        monitor_interval = 0

    return Bar
