"""The progress bars: what a terminal shows, what is printed without one, and what a step pays."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm.std import tqdm

import paceline as pl
from paceline.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from paceline.callbacks.progress_bar import ProgressBar, Stage, clock, line
from paceline.callbacks.rich_progress_bar import RichProgressBarTheme
from paceline.errors import ConfigurationError

from helpers.callback_runs import BATCHES, Scripted, loader, trainer
from helpers.ranks import run_ranks


class Terminal(io.StringIO):
    """Keeps what is written to it, and says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm-256color")
    return Terminal()


def fit_on(terminal: Terminal, job: pl.Trainer, *arguments: Any, **options: Any) -> str:
    """What the terminal got while `job` fitted, without colours and movements."""
    with contextlib.redirect_stdout(terminal):
        job.fit(*arguments, **options)
    return shown_on(terminal)


def shown_on(terminal: Terminal) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed, without the trainer's own lines."""
    return [
        text
        for text in capsys.readouterr().out.splitlines()
        if not text.startswith(("paceline:", "test:", "validate:"))
    ]


def run(root: Path, bar: ProgressBar, **options: Any) -> pl.Trainer:
    return trainer(root, bar, enable_progress_bar=True, **options)


# --- without a terminal ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_without_a_terminal_an_epoch_ends_with_one_plain_line(
    tmp_path: Path, bar: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, bar(), num_sanity_val_steps=2).fit(Scripted(), loader(), loader(2))
    first, second = lines_of(capsys)
    assert re.fullmatch(r"Epoch 0/1: 8/8 \[00:00, [\d.]+ it/s\], train_loss=\S+, val_score=0", first)
    assert re.fullmatch(r"Epoch 1/1: 8/8 \[00:00, [\d.]+ it/s\], train_loss=\S+, val_score=1", second)
    assert "\r" not in first + second


def test_a_validation_inside_an_epoch_has_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, TQDMProgressBar(), max_epochs=1, val_check_interval=0.5).fit(Scripted(), loader(), loader(2))
    found = [text.split(":")[0] for text in lines_of(capsys)]
    assert found == ["Validation", "Epoch 0/0"]


def test_evaluation_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = TQDMProgressBar()
    job = run(tmp_path, bar)
    job.validate(Scripted(), loader(2))
    job.test(Scripted(), loader(3))
    job.predict(Scripted(), loader(4))
    found = [text.split(" [")[0] for text in lines_of(capsys)]
    assert found == ["Validation: 2/2", "Testing: 3/3", "Predicting: 4/4"]


def test_the_epochs_own_metrics_are_in_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Counting(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("epoch_number", float(self.current_epoch), on_epoch=True, on_step=False, prog_bar=True)
            return super().training_step(batch, batch_idx)

    run(tmp_path, TQDMProgressBar(), max_epochs=3).fit(Counting(), loader())
    assert [text.rsplit("=", 1)[1] for text in lines_of(capsys)] == ["0", "1", "2"]


def test_long_epochs_tell_something_every_minute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.callbacks.progress_bar._SECONDS_BETWEEN_LINES", 0.0)
    run(tmp_path, TQDMProgressBar(refresh_rate=4), max_epochs=1).fit(Scripted(), loader())
    found = [text.split(" [")[0] for text in lines_of(capsys)]
    assert found == ["Epoch 0/0: 4/8", "Epoch 0/0: 8/8", "Epoch 0/0: 8/8"]


@pytest.mark.parametrize("switch_off", ["argument", "refresh_rate", "disable"])
def test_it_can_be_switched_off(tmp_path: Path, switch_off: str, capsys: pytest.CaptureFixture[str]) -> None:
    if switch_off == "argument":
        trainer(tmp_path, enable_progress_bar=False).fit(Scripted(), loader(), loader(2))
    else:
        bar = TQDMProgressBar(refresh_rate=0 if switch_off == "refresh_rate" else 1)
        if switch_off == "disable":
            bar.disable()
        run(tmp_path, bar).fit(Scripted(), loader(), loader(2))
    assert lines_of(capsys) == []


def test_lines_of_stages() -> None:
    stage = Stage("train", "Epoch 3", total=100, n=50, first=40, started=time.monotonic() - 5)
    assert line(stage, {"loss": 0.12345, "v_num": 3}) == "Epoch 3: 50/100 [00:05<00:25, 2.00 it/s], loss=0.123, v_num=3"
    assert "Epoch 3: 50 [" in line(Stage("train", "Epoch 3", n=50), None)
    assert (clock(75), clock(3675), clock(0.4)) == ("01:15", "1:01:15", "00:00")


# --- on a terminal -------------------------------------------------------------------------------------------------
def test_tqdm_draws_training_validation_and_metrics(tmp_path: Path, terminal: Terminal) -> None:
    bar = TQDMProgressBar()
    job = run(tmp_path, bar, num_sanity_val_steps=2, logger=True)
    screen = fit_on(terminal, job, Scripted(), loader(), loader(2))
    assert "Sanity Checking" in screen
    assert "Validation" in screen
    metrics = r"v_num=0, train_loss=\S+, val_score=1\.?0?"
    assert re.search(rf"Epoch 1/1: 100%\|[█#]+\| 8/8 \[\d\d:\d\d<.*it/s, {metrics}\]\n", screen)
    assert bar.train_progress_bar.n == bar.train_progress_bar.total == BATCHES
    assert bar.val_progress_bar.n == 2


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_several_loaders_are_named(tmp_path: Path, terminal: Terminal, kind: Any) -> None:
    job = run(tmp_path, kind(), max_epochs=1)
    assert "Validation DataLoader 1" in fit_on(terminal, job, Scripted(), loader(), [loader(2), loader(3)])


def test_rich_draws_training_validation_and_metrics(tmp_path: Path, terminal: Terminal) -> None:
    bar = RichProgressBar(console_kwargs={"force_terminal": True, "width": 160})
    screen = fit_on(terminal, run(tmp_path, bar, num_sanity_val_steps=2), Scripted(), loader(), loader(2))
    assert "Sanity Checking" in screen
    assert "Validation" in screen
    assert re.search(r"Epoch 1/1 ━+ +8/8 +\d\d:\d\d • 00:00 +[\d.]+it/s +train_loss: \S+ val_score: 1\.000", screen)
    assert bar.progress is None


def test_rich_has_themes_and_columns_of_ones_own(tmp_path: Path, terminal: Terminal) -> None:
    class Mine(RichProgressBar):
        def configure_columns(self, trainer: Any) -> Any:
            from rich.progress import TextColumn

            return [*super().configure_columns(trainer), TextColumn("my column")]

    theme = RichProgressBarTheme(metrics_format=".1e", metrics_text_delimiter="|")
    bar = Mine(theme=theme, console_kwargs={"force_terminal": True, "width": 200})
    screen = fit_on(terminal, run(tmp_path, bar), Scripted(), loader(), loader(2))
    assert "my column" in screen
    assert "|val_score: 1.0e+00" in screen


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_the_bar_of_each_epoch_can_stay(tmp_path: Path, terminal: Terminal, kind: Any) -> None:
    screen = fit_on(terminal, run(tmp_path, kind(leave=True), max_epochs=3), Scripted(), loader())
    last = screen.split("\r")[-1] if kind is RichProgressBar else "".join(re.findall(r"[^\r\n]*\n", screen))
    for epoch in range(3):
        assert len(re.findall(rf"Epoch {epoch}/2.*8/8", last)) == 1


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_prints_go_above_the_bar(tmp_path: Path, terminal: Terminal, kind: Any) -> None:
    class Talking(Scripted):
        def on_train_epoch_end(self) -> None:
            self.print("epoch", self.current_epoch, "is over")

    screen = fit_on(terminal, run(tmp_path, kind()), Talking(), loader())
    for epoch in range(2):
        assert re.search(rf"[\r\n]epoch {epoch} is over *\n", screen)


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_an_exception_closes_the_bar(tmp_path: Path, terminal: Terminal, kind: Any) -> None:
    class Failing(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 5:
                raise KeyError("bad")
            return super().training_step(batch, batch_idx)

    with pytest.raises(KeyError):
        fit_on(terminal, run(tmp_path, kind()), Failing(), loader())
    assert shown_on(terminal).endswith("\n")


def test_a_resumed_epoch_goes_on_where_it_was(tmp_path: Path, terminal: Terminal) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5)
    trainer(tmp_path, saves, max_steps=5).fit(Scripted(), loader())
    bar = TQDMProgressBar()
    fit_on(terminal, run(tmp_path, bar, max_epochs=1), Scripted(), loader(), ckpt_path=saves.best_model_path)
    assert (bar.train_progress_bar.n, bar.train_progress_bar.initial) == (BATCHES, 5)


# --- what users override -------------------------------------------------------------------------------------------
def test_bars_and_metrics_of_ones_own_are_used(tmp_path: Path, terminal: Terminal) -> None:
    class Mine(TQDMProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> Any:
            items = super().get_metrics(trainer, pl_module)
            items.pop("v_num", None)
            return {**items, "mine": "yes"}

        def init_train_tqdm(self) -> Any:
            return tqdm(desc="my training", file=sys.stdout, disable=self.is_disabled)

        def init_validation_tqdm(self) -> Any:
            bar = super().init_validation_tqdm()
            bar.set_description("my validation")
            return bar

    bar = Mine()
    screen = fit_on(terminal, run(tmp_path, bar, logger=True), Scripted(), loader(), loader(2))
    assert type(bar.train_progress_bar) is tqdm
    assert "my training" in screen
    assert "my validation" in screen
    assert "mine=yes" in screen
    assert "v_num" not in screen


def test_a_bar_of_ones_own_needs_only_hooks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Percent(ProgressBar):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            print(f"{(batch_idx + 1) / self.total_train_batches:.0%}")

    run(tmp_path, Percent(), max_epochs=1).fit(Scripted(), loader(4))
    assert lines_of(capsys)[:4] == ["25%", "50%", "75%", "100%"]


def test_asking_for_a_bar_that_is_not_there_is_told() -> None:
    with pytest.raises(TypeError, match="train progress bar"):
        _ = TQDMProgressBar().train_progress_bar
    with pytest.raises(TypeError, match="has not been set yet"):
        _ = TQDMProgressBar().total_train_batches


def test_a_negative_refresh_rate_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="refresh_rate=-1"):
        TQDMProgressBar(refresh_rate=-1)


def test_the_trainer_knows_its_bar(tmp_path: Path) -> None:
    for bar in (TQDMProgressBar(), RichProgressBar()):
        assert run(tmp_path, bar).progress_bar_callback is bar
    assert trainer(tmp_path).progress_bar_callback is None


# --- what it costs, and where it draws -----------------------------------------------------------------------------
def test_metrics_are_asked_for_only_to_draw(tmp_path: Path, terminal: Terminal) -> None:
    class Counting(TQDMProgressBar):
        asked = 0

        def get_metrics(self, trainer: Any, pl_module: Any) -> Any:
            self.asked += 1
            return super().get_metrics(trainer, pl_module)

    bar, began = Counting(), time.monotonic()
    fit_on(terminal, run(tmp_path, bar, max_epochs=1), Scripted(), loader(400))
    assert bar.asked <= 10 * (time.monotonic() - began) + 3


def draw_on_two_ranks(folder: str) -> None:
    run(Path(folder), TQDMProgressBar(), strategy="ddp", devices=2, max_epochs=1).fit(Scripted(), loader(), loader(3))


def test_only_rank_0_draws(tmp_path: Path) -> None:
    outputs = run_ranks(draw_on_two_ranks, 2, str(tmp_path)).outputs
    assert "Epoch 0/0: 4/4" in outputs[0]
    assert "Epoch" not in outputs[1]
