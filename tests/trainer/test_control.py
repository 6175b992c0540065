"""Agreed decisions: the wish of one rank stops all ranks after the same window, without a message a step."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist

import paceline as pl
from paceline.strategies import SingleDevice
from paceline.trainer.control import Control, Wish

from helpers.ranks import run_ranks
from helpers.tiny import Sums, numbers, tiny_trainer


class StopsOnOneRank(pl.Callback):
    """One rank asks to stop after so many steps of its own."""

    def __init__(self, rank: int, after: int) -> None:
        self.rank, self.after = rank, after

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.after:
            trainer.should_stop = True


def stop_on(rank: int, after: int, arguments: dict[str, Any]) -> Any:
    trainer = tiny_trainer(strategy="ddp", max_epochs=3, callbacks=StopsOnOneRank(rank, after), **arguments)
    trainer.fit(Sums(), numbers(400))
    return trainer.global_step, trainer.current_epoch, trainer.should_stop, trainer.state.finished


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2}])
def test_should_stop_on_one_rank_stops_all_after_the_same_step(ranks: int, arguments: dict[str, Any]) -> None:
    results = run_ranks(stop_on, ranks, ranks - 1, 5, arguments)
    assert len(set(results)) == 1
    steps, _, should_stop, finished = results[0]
    assert 5 <= steps < 3 * 200 // ranks
    assert should_stop
    assert finished


def test_a_wish_in_the_last_window_of_an_epoch_stops_at_that_epochs_end() -> None:
    for steps, epochs, should_stop, _ in run_ranks(stop_on, 2, 1, 100, {}):
        assert (steps, epochs, should_stop) == (100, 1, True)


def test_the_minimum_holds_for_the_wish_of_one_rank_too() -> None:
    for steps, epochs, _, _ in run_ranks(stop_on, 2, 0, 5, {"min_epochs": 2}):
        assert (steps, epochs) == (200, 2)


class TimeIsUpOnOneRank(Sums):
    """The clock of rank 1 is a minute ahead from step 5 on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1 and self.global_step == 5 and batch_idx == 5:
            self.trainer.fit_run.limits.started -= 60.0
        return super().training_step(batch, batch_idx)


def time_out() -> Any:
    trainer = tiny_trainer(strategy="ddp", max_time={"seconds": 50})
    trainer.fit(TimeIsUpOnOneRank(), numbers(4000))
    return trainer.global_step, trainer.should_stop


def test_a_time_limit_that_one_rank_reaches_first_stops_all() -> None:
    first, second = run_ranks(time_out, 2)
    assert first == second
    assert first[1]


def count_messages() -> Any:
    counted = 0
    real = dist.all_gather

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal counted
        counted += 1
        return real(*args, **kwargs)

    dist.all_gather = counting
    try:
        trainer = tiny_trainer(strategy="ddp", log_every_n_steps=10_000)
        started = time.monotonic()
        trainer.fit(Sums(), numbers(1200, batch_size=1))
        return counted, trainer.global_step, time.monotonic() - started
    finally:
        dist.all_gather = real


def test_agreeing_costs_a_message_now_and_then_never_one_a_step() -> None:
    for messages, steps, seconds in run_ranks(count_messages, 2):
        assert steps == 600
        assert messages < 20 + 5 * seconds


def test_alone_a_wish_is_an_order() -> None:
    wish = Wish.NONE
    control = Control(SingleDevice(), lambda: wish, lambda: None)
    assert not control.stop_agreed()
    wish = Wish.SUSPEND
    assert not control.suspending
    assert not control.stop_agreed_now()
    assert control.suspending
    wish = Wish.STOP
    assert control.stop_agreed()
    assert control.stop_agreed_now()
