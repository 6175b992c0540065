"""`ProgressBar`: what every progress bar shares: when to draw, what to show, and plain lines without a terminal.

A step pays an addition and a look at the clock: a drawing comes at most ten times a second, reads the metrics only
then, and never waits for a device. A kind of bar defines `_open`, `_draw` and `_close`; a bar of your own may instead
override any hook and call `super()`. Only rank 0 draws.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..trainer.argument_types import checked_types
from ..trainer.arguments import check_count
from ..trainer.callback import Callback

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..trainer.module import Module
    from ..trainer.trainer import Trainer

_SECONDS_BETWEEN_DRAWINGS = 0.1
_SECONDS_BETWEEN_LINES = 60.0


@dataclass
class Stage:
    """What is under way: one of the bars. `n` batches of `total` are done, `first` of them before this process."""

    kind: str  # train, sanity, validation, test, predict
    description: str
    total: float = math.inf
    n: int = 0
    first: int = 0
    dataloader_idx: int = 0
    started: float = field(default_factory=time.monotonic)


def _total(batches: str) -> Any:
    """The batches of the loader under way, of those in the trainer's `batches`."""
    return property(
        lambda bar: getattr(bar.trainer, batches)[bar._nested.dataloader_idx if bar._nested is not None else 0]
    )


class ProgressBar(Callback):
    """Draws nothing by itself. `get_metrics`, `enable`, `disable` and `print` are there to be overridden or called."""

    @checked_types
    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        self.refresh_rate: int = check_count("refresh_rate", refresh_rate, 0)
        self._enabled = refresh_rate > 0
        self._leave = leave  # the bar of an epoch stays on the screen when the next one begins
        self._epoch_drawn = ""
        self._trainer: Trainer | None = None
        self._totals: Sequence[int | float] = ()
        self._description = ""
        self._nested_began = 0.0
        self._train: Stage | None = None
        self._nested: Stage | None = None
        self._seen = 0
        self._next_drawing = 0.0
        self._terminal = False
        self._interval = _SECONDS_BETWEEN_DRAWINGS

    # --- what users override and call --------------------------------------------------------------------------
    def get_metrics(self, trainer: Trainer, pl_module: Module) -> dict[str, int | str | float | dict[str, float]]:
        """What stands after the bar: the logger's version as `v_num`, and what was logged with `prog_bar=True`."""
        shown: dict[str, int | str | float | dict[str, float]] = {}
        version = trainer.loggers[0].version if trainer.loggers else None
        if version is not None:
            shown["v_num"] = version[-4:] if isinstance(version, str) else version
        return {**shown, **trainer.progress_bar_metrics}

    def disable(self) -> None:
        """Draw nothing from now on."""
        self._enabled = False

    def enable(self) -> None:
        """Draw again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        print(*args, **kwargs)

    @property
    def is_enabled(self) -> bool:
        """Whether this rank draws."""
        return self._enabled and self.refresh_rate > 0

    @property
    def is_disabled(self) -> bool:
        """Whether this rank draws nothing."""
        return not self.is_enabled

    @property
    def trainer(self) -> Trainer:
        """The trainer that runs; an error before it does."""
        if self._trainer is None:
            raise TypeError(f"The `{type(self).__name__}._trainer` reference has not been set yet.")
        return self._trainer

    @property
    def train_description(self) -> str:
        """What the bar of training is called."""
        return "Training"

    @property
    def sanity_check_description(self) -> str:
        """What the bar of the sanity check is called."""
        return "Sanity Checking"

    @property
    def validation_description(self) -> str:
        """What the bar of validation is called."""
        return "Validation"

    @property
    def test_description(self) -> str:
        """What the bar of testing is called."""
        return "Testing"

    @property
    def predict_description(self) -> str:
        """What the bar of predicting is called."""
        return "Predicting"

    @property
    def total_train_batches(self) -> int | float:
        """The batches of a training epoch; inf where nobody knows."""
        return self.trainer.num_training_batches

    @property
    def total_val_batches(self) -> int | float:
        """The batches of all validation loaders."""
        return sum(self.trainer.num_val_batches)

    total_val_batches_current_dataloader: int | float = _total("num_val_batches")
    total_test_batches_current_dataloader: int | float = _total("num_test_batches")
    total_predict_batches_current_dataloader: int | float = _total("num_predict_batches")

    # --- what a kind of bar defines ------------------------------------------------------------------------------
    def _open(self, stage: Stage) -> None:
        """`stage` begins: show its bar."""

    def _draw(self, stage: Stage, metrics: dict[str, Any] | None) -> None:
        """Show where `stage` is, and `metrics` unless None."""

    def _close(self, stage: Stage) -> None:
        """`stage` is over."""

    def _leaves_epoch(self, stage: Stage) -> bool:
        """Whether what is drawn now is another epoch than before, whose bar stays where it is."""
        if not self._leave or stage.kind != "train":
            return False
        before, self._epoch_drawn = self._epoch_drawn, stage.description
        return before not in ("", stage.description)

    def _is_terminal(self) -> bool:
        """Whether a bar can be drawn over itself."""
        return sys.stdout.isatty() or "ipykernel" in sys.modules

    # --- when to draw: fit ---------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._trainer = trainer
        if not trainer.is_global_zero:
            self.disable()
        self._terminal = self._is_terminal()
        self._interval = _SECONDS_BETWEEN_DRAWINGS if self._terminal else _SECONDS_BETWEEN_LINES

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._next_drawing = math.inf
        if self.is_enabled:
            self._next_drawing = 0.0 if self._terminal else time.monotonic() + self._interval
            self._train = Stage("train", self.train_description)
            self._begin_epoch(trainer, self._train)  # one that is resumed in its middle is not announced again
            self._open(self._train)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self._train is not None:
            self._end_epoch(trainer, pl_module, self._train)
            self._begin_epoch(trainer, self._train)

    def _begin_epoch(self, trainer: Trainer, stage: Stage) -> None:
        last = (trainer.max_epochs or 0) - 1
        stage.description = f"Epoch {trainer.current_epoch}" + (f"/{last}" if last >= 0 else "")
        stage.total = trainer.num_training_batches
        stage.n = stage.first = trainer.progress.batches_in_epoch  # not 0 where a run is resumed
        stage.started = time.monotonic()
        self._seen = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._seen += 1
        now = time.monotonic()
        if now < self._next_drawing or (batch_idx + 1) % self.refresh_rate or self._train is None:
            return
        self._show_train(trainer, pl_module, self._train)
        self._next_drawing = now + self._interval

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._train is not None:
            self._next_drawing = 0.0
            self._end_epoch(trainer, pl_module, self._train)
            self._close(self._train)
            self._train = None

    def _end_epoch(self, trainer: Trainer, pl_module: Module, stage: Stage) -> None:
        """Show the end of an epoch when the next one begins or training ends: by then its metrics are there."""
        now = time.monotonic()
        if self._seen and (now >= self._next_drawing or self._leave or not self._terminal):
            self._show_train(trainer, pl_module, stage)
            self._next_drawing = now + self._interval

    def _show_train(self, trainer: Trainer, pl_module: Module, stage: Stage) -> None:
        stage.n = stage.first + self._seen
        stage.total = trainer.num_training_batches
        self._show(stage, self.get_metrics(trainer, pl_module))

    # --- when to draw: evaluation --------------------------------------------------------------------------------
    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.sanity_checking:
            self._begin("sanity", self.sanity_check_description, trainer.num_sanity_val_batches)
        else:
            self._begin("validation", self.validation_description, trainer.num_val_batches)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._advance(batch_idx, dataloader_idx)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        # The line of an epoch that ends here shows the same metrics; the sanity check's say nothing.
        quiet = trainer.sanity_checking or (trainer.state.fn == "fit" and trainer.is_last_batch)
        self._end(trainer, pl_module, quiet and not self._terminal)

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._begin("test", self.test_description, trainer.num_test_batches)

    def on_test_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end(trainer, pl_module)

    on_predict_end = on_test_end

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._begin("predict", self.predict_description, trainer.num_predict_batches)

    def _begin(self, kind: str, description: str, totals: Sequence[int | float]) -> None:
        if self.is_disabled:
            return
        self._totals, self._description, self._nested_began = totals, description, time.monotonic()
        self._nested = Stage(kind, description)
        self._enter_loader(self._nested, 0)
        self._open(self._nested)
        self._next_drawing = 0.0 if self._terminal else time.monotonic() + self._interval

    def _enter_loader(self, stage: Stage, index: int) -> None:
        stage.dataloader_idx, stage.n, stage.started = index, 0, time.monotonic()
        stage.total = self._totals[index] if index < len(self._totals) else math.inf
        stage.description = self._description + (f" DataLoader {index}" if len(self._totals) > 1 else "")

    def _advance(self, batch_idx: int, dataloader_idx: int) -> None:
        stage = self._nested
        if stage is None:
            return
        if dataloader_idx != stage.dataloader_idx:
            self._enter_loader(stage, dataloader_idx)
        # Batches are dealt to the ranks in turn, so the others have got as far in theirs.
        stage.n = int(min(stage.total, batch_idx + self.trainer.world_size))
        now = time.monotonic()
        if now >= self._next_drawing and (batch_idx + 1) % self.refresh_rate == 0:
            self._show(stage, None)
            self._next_drawing = now + self._interval

    def _end(self, trainer: Trainer, pl_module: Module, quiet: bool = False) -> None:
        stage = self._nested
        if stage is None:
            return
        self._nested = None
        if not quiet:
            below_training = self._terminal and self._train is not None  # whose bar shows them
            self._show(stage, None if below_training else self.get_metrics(trainer, pl_module))
        self._close(stage)
        if self._train is not None:
            self._train.started += time.monotonic() - self._nested_began  # the speed shown is that of training

    # --- the end -------------------------------------------------------------------------------------------------
    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        self._close_all()

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._close_all()

    def _close_all(self) -> None:
        for stage in (self._nested, self._train):
            if stage is not None:
                self._close(stage)
        self._nested = self._train = None

    def _show(self, stage: Stage, metrics: dict[str, Any] | None) -> None:
        self._draw(stage, metrics)
        if not self._terminal:
            print(line(stage, metrics), flush=True)


def line(stage: Stage, metrics: dict[str, Any] | None) -> str:
    """`stage` in one line of plain text: `Epoch 0/9: 80/80 [00:12, 6.61 it/s], loss=0.123`."""
    elapsed = time.monotonic() - stage.started
    done = stage.n - stage.first
    left = ""
    if done > 0 and stage.n < stage.total < math.inf:
        left = f"<{clock((stage.total - stage.n) * elapsed / done)}"
    speed = f"{done / elapsed:.2f} it/s" if elapsed > 0 else "? it/s"
    of = f"/{stage.total}" if stage.total < math.inf else ""
    shown = "".join(f", {name}={number(value)}" for name, value in (metrics or {}).items())
    return f"{stage.description}: {stage.n}{of} [{clock(elapsed)}{left}, {speed}]{shown}"


def clock(seconds: float) -> str:
    """`75` → `01:15`, `3675` → `1:01:15`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def number(value: Any) -> str:
    """A metric in few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
