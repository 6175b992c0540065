"""When `fit` stops, and how much of the data each stage reads."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import paceline as pl
from paceline.callbacks import EarlyStopping

from helpers.tiny import Sums, numbers, tiny_trainer


class Evaluated(Sums):
    """Counts what is read in each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = dict.fromkeys(("train", "val", "test", "predict", "epoch_ends", "train_starts"), 0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.counts["train"] += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.counts["val"] += 1
        self.log("val_loss", 1.0)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.counts["test"] += 1

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.counts["predict"] += 1

    def on_train_epoch_end(self) -> None:
        self.counts["epoch_ends"] += 1

    def on_train_start(self) -> None:
        self.counts["train_starts"] += 1


def fit(**arguments: Any) -> tuple[Evaluated, pl.Trainer]:
    module, trainer = Evaluated(), tiny_trainer(**{"num_sanity_val_steps": 0, **arguments})
    trainer.fit(module, numbers(20), numbers(6))
    return module, trainer


# --- epochs and steps -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "steps", "epochs"),
    [
        ({"max_epochs": 2}, 20, 2),
        ({"max_steps": 15}, 15, 1),
        ({"max_steps": 10}, 10, 1),
        ({"max_steps": 20}, 20, 2),
        ({"max_epochs": 2, "max_steps": 15}, 15, 1),
        ({"max_epochs": 1, "max_steps": 15}, 10, 1),
        ({"max_epochs": -1, "max_steps": 15}, 15, 1),
        ({"max_steps": 7, "accumulate_grad_batches": 3}, 7, 1),
        ({"max_epochs": 0}, 0, 0),
        ({"max_steps": 0}, 0, 0),
    ],
)
def test_fit_ends_at_the_first_limit_it_reaches(arguments: dict[str, Any], steps: int, epochs: int) -> None:
    module, trainer = fit(**arguments)
    assert (trainer.global_step, trainer.current_epoch) == (steps, epochs)
    assert module.counts["train_starts"] == (1 if steps else 0)
    assert trainer.state.finished


def test_ending_inside_an_epoch_ends_what_was_logged_but_not_the_epoch() -> None:
    module, trainer = fit(max_steps=15)
    assert trainer.current_epoch == 1
    assert module.counts["epoch_ends"] == 2
    assert module.counts["val"] == 3  # after the first epoch alone


def test_a_time_limit_ends_fit_at_the_end_of_a_window() -> None:
    class Slow(Evaluated):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trainer.global_step == 3:
                self.trainer.fit_run.limits.started -= 60.0  # as if a minute had passed
            return super().training_step(batch, batch_idx)

    module, trainer = Slow(), tiny_trainer(max_time="00:00:00:30", accumulate_grad_batches=2)
    trainer.fit(module, numbers(20))
    assert trainer.global_step == 4
    assert module.counts["train"] == 8


def test_a_time_limit_that_is_over_trains_nothing() -> None:
    _, trainer = fit(max_time={"seconds": 0})
    assert trainer.global_step == 0


def test_the_time_limit_counts_from_the_start_of_training_in_each_fit() -> None:
    trainer = tiny_trainer(max_time={"minutes": 1}, max_epochs=1)
    for _ in range(2):
        before = time.monotonic()
        trainer.fit(Evaluated(), numbers(4))
        assert trainer.fit_run.limits.started >= before


# --- stopping early -------------------------------------------------------------------------------------------------
class Stops(pl.Callback):
    """Asks to stop after so many steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= self.after:
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("arguments", "steps", "epochs"),
    [
        ({}, 3, 0),
        ({"min_steps": 7}, 7, 0),
        ({"min_steps": 2}, 3, 0),
        ({"min_epochs": 1}, 10, 1),
        ({"min_epochs": 2, "min_steps": 5}, 20, 2),
        ({"min_epochs": 1, "min_steps": 12}, 12, 1),
        ({"min_steps": 100}, 30, 3),
        ({"min_steps": 8, "accumulate_grad_batches": 4}, 8, 2),
    ],
)
def test_a_wish_to_stop_waits_for_the_minimum(arguments: dict[str, Any], steps: int, epochs: int) -> None:
    _, trainer = fit(max_epochs=3, callbacks=Stops(3), **arguments)
    assert (trainer.global_step, trainer.current_epoch) == (steps, epochs)
    assert trainer.should_stop


def test_stopping_early_validates_once_more() -> None:
    module, _ = fit(max_epochs=3, callbacks=Stops(13))
    assert module.counts["val"] == 3 + 3


def test_a_wish_from_before_fit_is_forgotten() -> None:
    trainer = tiny_trainer()
    trainer.should_stop = True
    trainer.fit(Evaluated(), numbers(4))
    assert trainer.global_step == 2


def test_early_stopping_ends_fit_at_the_epoch_where_patience_ran_out() -> None:
    _, trainer = fit(max_epochs=10, callbacks=EarlyStopping("val_loss", patience=2))
    assert trainer.current_epoch == 3
    assert trainer.early_stopping_callback.stopped_epoch == 2


# --- how much is read -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("limit", "kept"), [(4, 4), (100, 10), (0.5, 5), (0.39, 3), (1.0, 10), (1, 1)])
def test_limit_train_batches_is_a_number_or_a_fraction(limit: Any, kept: int) -> None:
    module, trainer = fit(max_epochs=2, limit_train_batches=limit)
    assert module.counts["train"] == 2 * kept
    assert trainer.num_training_batches == kept


@pytest.mark.parametrize("limit", [0, 0.0])
def test_limit_train_batches_0_trains_nothing(limit: Any) -> None:
    module, trainer = fit(limit_train_batches=limit)
    assert module.counts["train"] == module.counts["train_starts"] == 0
    assert trainer.state.finished


@pytest.mark.parametrize("limit", [0, 0.0])
def test_limit_val_batches_0_validates_nothing(limit: Any) -> None:
    module, trainer = fit(limit_val_batches=limit, num_sanity_val_steps=2)
    assert module.counts["val"] == 0
    assert trainer.num_val_batches == []


def test_limits_of_the_four_stages_are_their_own() -> None:
    module = Evaluated()
    trainer = tiny_trainer(
        limit_train_batches=1,
        limit_val_batches=2,
        limit_test_batches=3,
        limit_predict_batches=4,
        num_sanity_val_steps=0,
    )
    data = numbers(20)
    trainer.fit(module, data, data)
    trainer.test(module, data)
    trainer.predict(module, data)
    assert [module.counts[stage] for stage in ("train", "val", "test", "predict")] == [1, 2, 3, 4]


@pytest.mark.parametrize(("value", "batches"), [(True, 1), (1, 1), (3, 3)])
def test_fast_dev_run_reads_so_many_batches_of_each_stage_and_writes_nothing(
    value: Any, batches: int, tmp_path: Any
) -> None:
    module = Evaluated()
    trainer = pl.Trainer(accelerator="cpu", fast_dev_run=value, enable_progress_bar=False, default_root_dir=tmp_path)
    data = numbers(20)
    trainer.fit(module, data, data)
    trainer.test(module, data, verbose=False)
    trainer.predict(module, data)
    assert [module.counts[stage] for stage in ("train", "val", "test", "predict")] == [batches] * 4
    assert (trainer.max_epochs, trainer.max_steps, trainer.current_epoch) == (1, batches, 1)
    assert trainer.checkpoint_callback is None
    assert list(tmp_path.iterdir()) == []


def test_fast_dev_run_overrules_the_limits_and_keeps_a_checkpoint_callback_silent(tmp_path: Any) -> None:
    from paceline.callbacks import ModelCheckpoint

    module, checkpoint = Evaluated(), ModelCheckpoint(dirpath=tmp_path)
    trainer = pl.Trainer(
        accelerator="cpu", fast_dev_run=2, max_epochs=7, max_steps=30, limit_train_batches=5, num_sanity_val_steps=5,
        val_check_interval=1.0, callbacks=checkpoint, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, numbers(20), numbers(20))
    assert (module.counts["train"], module.counts["val"]) == (2, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("value", "batches"), [(3, 3), (0.2, 2), (0, 10)])
def test_overfit_batches_trains_on_the_same_batches_every_epoch_and_validates_as_many(value: Any, batches: int) -> None:
    module, trainer = Evaluated(), tiny_trainer(overfit_batches=value, max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, numbers(20, shuffle=value != 0), numbers(20))
    assert module.counts["train"] == module.counts["val"] == 2 * batches
    assert module.seen[:batches] == module.seen[batches:] == [[2 * i, 2 * i + 1] for i in range(batches)]


def test_reload_dataloaders_every_n_epochs_makes_new_loaders() -> None:
    class Reloads(Evaluated):
        made: tuple[str, ...] = ()

        def train_dataloader(self) -> Any:
            self.made += (f"train {self.current_epoch}",)
            return numbers(2 * (self.current_epoch + 1))

        def val_dataloader(self) -> Any:
            self.made += (f"val {self.current_epoch}",)
            return numbers(2)

    module = Reloads()
    trainer = tiny_trainer(reload_dataloaders_every_n_epochs=2, max_epochs=5, num_sanity_val_steps=0)
    trainer.fit(module)
    assert module.made == ("train 0", "val 0", "train 2", "val 2", "train 4", "val 4")
    assert trainer.global_step == 1 + 1 + 3 + 3 + 5


def test_an_empty_loader_ends_training_with_a_warning() -> None:
    trainer = tiny_trainer(max_epochs=5)
    with pytest.warns(UserWarning, match="Nothing is trained: the training loader"):
        trainer.fit(Evaluated(), numbers(0))
    assert trainer.global_step == 0


def test_a_generator_that_is_used_up_ends_training_with_a_warning() -> None:
    trainer = tiny_trainer(max_epochs=5)
    with pytest.warns(UserWarning, match="an epoch had no batch. The loader is empty, or can be iterated only once"):
        trainer.fit(Sums(), (torch.arange(2) for _ in range(3)))
    assert trainer.global_step == 3


def test_loaders_given_to_fit_are_not_reloaded() -> None:
    module = Evaluated()
    trainer = tiny_trainer(reload_dataloaders_every_n_epochs=1, max_epochs=3)
    trainer.fit(module, data := numbers(4))
    assert trainer.train_dataloader is data
    assert module.counts["train"] == 6
