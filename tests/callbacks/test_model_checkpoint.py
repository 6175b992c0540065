"""`ModelCheckpoint`: when it saves, under which names, and what it keeps."""

from __future__ import annotations

import inspect
import json
import math
import os
import uuid
import zlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import paceline as pl
from paceline.callbacks import Callback, ModelCheckpoint
from paceline.callbacks.checkpoint_names import format_name
from paceline.callbacks.top_k import best, comparable, qualifies, worst
from paceline.errors import ConfigurationError
from paceline.trainer.agreed_clock import AgreedClock, steps_to_wait
from paceline.trainer.checkpoint import resolve_pointer
from paceline.trainer.checkpoint.strict_json import write_json

from helpers.callback_runs import BATCHES, Scripted, loader, trainer
from helpers.ranks import run_ranks


# --- names -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{epoch}-{step}", "epoch=3-step=40"),
        ("{epoch:02d}-{val_loss:.2f}", "epoch=03-val_loss=0.12"),
        ("best", "best"),
        ("sample-{val/acc:.1f}", "sample-val_acc=0.5"),
        ("{missing:.1f}", "missing=0.0"),
        ("{epoch}{epoch}", "epoch=3epoch=3"),
    ],
)
def test_templates_are_filled_with_metrics(template: str, expected: str) -> None:
    metrics = {"epoch": torch.tensor(3), "step": 40, "val_loss": torch.tensor(0.1234), "val/acc": 0.5}
    assert format_name(template, metrics) == expected


def test_names_of_metrics_can_be_left_out() -> None:
    name = format_name("epoch={epoch:03d}-acc={val/acc:.2f}", {"epoch": 3, "val/acc": 0.5}, False)
    assert name == "epoch=003-acc=0.50"


def test_a_format_that_does_not_suit_is_told() -> None:
    with pytest.raises(ConfigurationError, match=r"formats val_loss=0.5 with '02d'"):
        format_name("{val_loss:02d}", {"val_loss": 0.5})


def test_format_checkpoint_name_as_users_call_it() -> None:
    callback = ModelCheckpoint(dirpath="/x", filename="{epoch}-{acc:.1f}")
    metrics = {"epoch": torch.tensor(1), "step": torch.tensor(2), "acc": torch.tensor(0.5)}
    assert callback.format_checkpoint_name(metrics) == "/x/epoch=1-acc=0.5.ckpt"
    assert callback.format_checkpoint_name(metrics, ver=2) == "/x/epoch=1-acc=0.5-v2.ckpt"
    assert callback.format_checkpoint_name(metrics, filename="last") == "/x/last.ckpt"
    assert ModelCheckpoint().format_checkpoint_name(metrics) == "epoch=1-step=2.ckpt"
    callback.CHECKPOINT_EQUALS_CHAR = "_"
    callback.FILE_EXTENSION = ".mine"
    assert callback.format_checkpoint_name(metrics) == "/x/epoch_1-acc_0.5.mine"


# --- the k best --------------------------------------------------------------------------------------------------
def test_the_best_are_found_and_ties_keep_the_older() -> None:
    held = {"a": 1.0, "b": 3.0, "c": 1.0, "d": 3.0}
    assert (best(held, "min"), worst(held, "min")) == ("a", "b")
    assert (best(held, "max"), worst(held, "max")) == ("b", "a")
    assert qualifies(2.9, held, 4, "min")
    assert not qualifies(3.0, held, 4, "min")
    assert qualifies(9.0, held, -1, "min")
    assert qualifies(9.0, held, 5, "min")
    assert not qualifies(-9.0, {}, 0, "min")


def test_nan_is_the_worst_score() -> None:
    assert comparable(math.nan, "min") == math.inf
    assert comparable(math.nan, "max") == -math.inf
    assert not qualifies(math.nan, {"a": 5.0}, 1, "min")
    assert qualifies(math.nan, {}, 1, "min")


# --- arguments ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "unknown"}, "`mode` can be 'min' or 'max'"),
        ({"save_top_k": -2}, "Invalid value for save_top_k=-2"),
        ({"save_top_k": 3}, "No quantity for top_k to track"),
        ({"every_n_train_steps": -1}, "Invalid value for every_n_train_steps=-1"),
        ({"every_n_epochs": -1}, "Invalid value for every_n_epochs=-1"),
        ({"every_n_train_steps": 1, "every_n_epochs": 1}, "mutually exclusive"),
        ({"every_n_epochs": 1, "train_time_interval": timedelta(1)}, "mutually exclusive"),
        ({"enable_version_counter": False}, "never overwritten"),
        ({"save_last": "copy"}, "save_last='copy'"),
        ({"filename": "a/{epoch}"}, "plain name"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ModelCheckpoint(**arguments)


def test_every_argument_can_be_read() -> None:
    given = {name: parameter.default for name, parameter in inspect.signature(ModelCheckpoint).parameters.items()}
    callback = ModelCheckpoint()
    assert {name: getattr(callback, name) for name in given} == given | {"every_n_train_steps": 0, "every_n_epochs": 1}


def test_callbacks_that_differ_have_different_keys() -> None:
    keys = {
        ModelCheckpoint(**arguments).state_key
        for arguments in (
            {},
            {"monitor": "a"},
            {"monitor": "a", "mode": "max"},
            {"every_n_train_steps": 5},
            {"every_n_epochs": 5},
            {"train_time_interval": timedelta(1)},
        )
    }
    assert len(keys) == 6


# --- runs --------------------------------------------------------------------------------------------------------
def saved(folder: Path | str) -> list[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def global_step(path: str) -> int:
    step: int = json.loads((Path(path) / "manifest.json").read_text())["meta"]["global_step"]
    return step


def test_without_a_monitor_the_newest_is_kept(tmp_path: Path) -> None:
    callback = ModelCheckpoint()
    run = trainer(tmp_path, callback, max_epochs=3)
    run.fit(Scripted(), loader(), loader(2))
    folder = tmp_path / "version_0" / "checkpoints"
    assert callback.dirpath == str(folder)
    assert saved(folder) == [f"epoch=2-step={3 * BATCHES}.ckpt"]
    assert callback.best_model_path == str(folder / saved(folder)[0])
    assert callback.best_model_score is None
    assert callback.last_model_path == ""


@pytest.mark.parametrize(("mode", "expected"), [("min", ["2.0", "1.0"]), ("max", ["4.0", "3.0"])])
def test_the_k_best_are_kept(tmp_path: Path, mode: str, expected: list[str]) -> None:
    callback = ModelCheckpoint(tmp_path, "{val_score:.1f}", "val_score", mode=mode, save_top_k=2)
    trainer(tmp_path, callback, max_epochs=5).fit(Scripted([3, 2, 4, 1, 2.5]), loader(), loader(2))
    assert saved(tmp_path)[:2] == sorted(f"val_score={score}.ckpt" for score in expected)
    assert callback.best_model_path == str(tmp_path / f"val_score={expected[1] if mode == 'min' else expected[0]}.ckpt")
    assert isinstance(callback.best_model_score, torch.Tensor)
    assert callback.best_model_score.item() == float(expected[1] if mode == "min" else expected[0])
    assert callback.kth_best_model_path.endswith(f"{expected[0] if mode == 'min' else expected[1]}.ckpt")
    assert callback.kth_value.item() == float(expected[0] if mode == "min" else expected[1])
    assert sorted(callback.best_k_models) == sorted(str(tmp_path / f"val_score={s}.ckpt") for s in expected)
    assert callback.current_score is not None


@pytest.mark.parametrize(("save_top_k", "count"), [(-1, 4), (0, 0), (1, 1)])
def test_save_top_k_counts(tmp_path: Path, save_top_k: int, count: int) -> None:
    for monitor in (None, "val_score"):
        folder = tmp_path / str(monitor)
        callback = ModelCheckpoint(folder, monitor=monitor, save_top_k=save_top_k)
        trainer(tmp_path, callback, max_epochs=4).fit(Scripted([4, 3, 2, 1]), loader(), loader(2))
        assert len(saved(folder)) == count


@pytest.mark.parametrize("every", [1, 2])
def test_all_are_kept_beside_last_and_what_only_last_pointed_to_goes(tmp_path: Path, every: int) -> None:
    callback = ModelCheckpoint(tmp_path / "saved", "{epoch}", every_n_epochs=every, save_top_k=-1, save_last=True)
    trainer(tmp_path, callback, max_epochs=5).fit(Scripted(), loader())
    kept = {every - 1 + every * number for number in range(5 // every)} | {4}
    assert saved(tmp_path / "saved") == [*(f"epoch={epoch}.ckpt" for epoch in sorted(kept)), "last.ckpt"]


def test_nan_does_not_replace_a_number(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{epoch}", "val_score")
    trainer(tmp_path, callback, max_epochs=3).fit(Scripted([math.nan, 2.0, math.nan]), loader(), loader(2))
    assert callback.best_model_path == str(tmp_path / "epoch=1.ckpt")
    assert callback.best_model_score == 2.0


def test_last_points_to_the_newest_whether_it_is_among_the_best_or_not(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{epoch}", "val_score", save_last=True)
    run = trainer(tmp_path, callback, max_epochs=3)
    run.fit(Scripted([1, 2, 3]), loader(), loader(2))
    assert callback.last_model_path == str(tmp_path / "last.ckpt")
    assert [n for n in saved(tmp_path) if n.endswith(".ckpt")] == ["epoch=0.ckpt", "epoch=2.ckpt", "last.ckpt"]
    assert callback.best_model_path == str(tmp_path / "epoch=0.ckpt")

    again = trainer(tmp_path, max_epochs=4)
    again.fit(Scripted(), loader(), ckpt_path=callback.last_model_path)
    assert again.global_step == 4 * BATCHES


def test_what_last_pointed_to_goes_when_it_moves_on_and_the_best_stay(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{epoch}", "val_score", save_last="link", save_top_k=2)
    trainer(tmp_path, callback, max_epochs=6).fit(Scripted([2, 5, 6, 1, 7, 8]), loader(), loader(2))
    assert [n for n in saved(tmp_path) if n.endswith(".ckpt")] == [
        "epoch=0.ckpt",
        "epoch=3.ckpt",
        "epoch=5.ckpt",
        "last.ckpt",
    ]


def test_only_last_can_be_kept(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=0, save_last=True)
    trainer(tmp_path, callback, max_epochs=3).fit(Scripted(), loader(), loader(2))
    assert [n for n in saved(tmp_path) if n.endswith(".ckpt")] == ["epoch=2.ckpt", "last.ckpt"]


def test_a_name_of_its_own_for_last_may_hold_metrics(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{step}", save_last=True)
    callback.CHECKPOINT_NAME_LAST = "{epoch}-last"
    trainer(tmp_path, callback, max_epochs=2).fit(Scripted(), loader(), loader(2))
    assert callback.last_model_path == str(tmp_path / "epoch=1-last.ckpt")
    assert [n for n in saved(tmp_path) if n.endswith(".ckpt")] == ["epoch=1-last.ckpt", f"step={2 * BATCHES}.ckpt"]


class Saves(Callback):
    """Notes the step of every save, through the hook that each one calls."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.Module, checkpoint: dict[str, Any]) -> None:
        self.steps.append(checkpoint["global_step"])


def steps_saved(tmp_path: Path, callback: ModelCheckpoint, validate: bool = True, **options: Any) -> list[int]:
    notes = Saves()
    run = trainer(tmp_path, notes, callback, **options)
    run.fit(Scripted([9, 8, 7, 6, 5, 4, 3, 2, 1]), loader(), loader(2) if validate else None)
    return notes.steps


def test_it_saves_every_n_steps(tmp_path: Path) -> None:
    assert steps_saved(tmp_path, ModelCheckpoint(every_n_train_steps=3, save_top_k=-1)) == [3, 6, 9, 12, 15]


def test_steps_are_updates_not_batches(tmp_path: Path) -> None:
    callback = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)
    assert steps_saved(tmp_path, callback, accumulate_grad_batches=2) == [2, 4, 6, 8]


def test_it_saves_every_n_epochs(tmp_path: Path) -> None:
    callback = ModelCheckpoint(every_n_epochs=2, save_top_k=-1)
    assert steps_saved(tmp_path, callback, max_epochs=5) == [2 * BATCHES, 4 * BATCHES]


def test_zero_epochs_turn_it_off(tmp_path: Path) -> None:
    assert steps_saved(tmp_path, ModelCheckpoint(every_n_epochs=0)) == []


def test_it_saves_after_each_validation_inside_an_epoch(tmp_path: Path) -> None:
    assert steps_saved(tmp_path, ModelCheckpoint(save_top_k=-1), val_check_interval=0.5) == [4, 8, 12, 16]


def test_it_saves_at_the_end_of_an_epoch_when_asked_to(tmp_path: Path) -> None:
    callback = ModelCheckpoint(save_top_k=-1, save_on_train_epoch_end=True)
    assert steps_saved(tmp_path, callback, val_check_interval=0.5) == [8, 16]


def test_validation_every_other_epoch_saves_every_other_epoch(tmp_path: Path) -> None:
    callback = ModelCheckpoint(monitor="val_score", save_top_k=-1)
    assert steps_saved(tmp_path, callback, max_epochs=4, check_val_every_n_epoch=2) == [16, 32]


def test_without_validation_it_saves_each_epoch(tmp_path: Path) -> None:
    assert steps_saved(tmp_path, ModelCheckpoint(save_top_k=-1), validate=False) == [8, 16]


def test_it_saves_by_time(tmp_path: Path) -> None:
    assert steps_saved(tmp_path, ModelCheckpoint(train_time_interval=timedelta(0), save_top_k=-1)) == [*range(1, 17)]
    assert steps_saved(tmp_path, ModelCheckpoint(train_time_interval=timedelta(hours=1))) == []


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    callback = ModelCheckpoint(every_n_train_steps=8, save_last=True, save_top_k=-1)
    assert steps_saved(tmp_path, callback) == [8, 16]


def test_last_is_saved_at_the_end_where_nothing_was(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, every_n_train_steps=100, save_last=True)
    assert steps_saved(tmp_path, callback) == [16]
    assert (tmp_path / "last.ckpt").exists()


def test_nothing_is_saved_in_a_sanity_check_or_a_fast_dev_run(tmp_path: Path) -> None:
    assert steps_saved(tmp_path, ModelCheckpoint(every_n_train_steps=1), fast_dev_run=True) == []
    assert steps_saved(tmp_path, ModelCheckpoint(save_top_k=-1), num_sanity_val_steps=2, val_check_interval=0.5) == [
        4,
        8,
        12,
        16,
    ]


def test_a_save_by_steps_that_waits_for_a_metric_happens_after_the_validation(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{step}", "val_score", every_n_train_steps=6, save_top_k=-1)
    assert steps_saved(tmp_path, callback) == [8, 12]  # 6 had no score yet, so the first validation saves


def test_a_save_that_meets_a_validation_uses_its_fresh_metric(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{step}", "val_score", every_n_train_steps=8, save_top_k=-1)
    assert steps_saved(tmp_path, callback) == [8, 16]
    assert [float(score) for score in callback.best_k_models.values()] == [9, 8]


def test_a_step_metric_is_monitored_by_its_value_at_that_step(tmp_path: Path) -> None:
    class Counting(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("count", float(self.global_step + 1))
            return super().training_step(batch, batch_idx)

    callback = ModelCheckpoint(tmp_path, "{step}-{count:.0f}", "count", mode="max", every_n_train_steps=5)
    trainer(tmp_path, callback).fit(Counting(), loader())
    assert [n for n in saved(tmp_path) if n.endswith(".ckpt")] == ["step=15-count=15.ckpt"]


@pytest.mark.parametrize("validate", [True, False])
def test_a_metric_that_was_never_logged_is_an_error_that_lists_those_that_were(tmp_path: Path, validate: bool) -> None:
    run = trainer(tmp_path, ModelCheckpoint(monitor="val_los"))
    with pytest.raises(ConfigurationError, match=r"monitor='val_los'.*never logged.*'train_loss'.*self\.log\("):
        run.fit(Scripted(), loader(), loader(2) if validate else None)
    assert run.global_step == BATCHES
    assert run.current_epoch == 0


def test_a_taken_name_gets_a_version(tmp_path: Path) -> None:
    for _ in range(2):
        callback = ModelCheckpoint(tmp_path, "mine", save_last=True)
        trainer(tmp_path, callback, max_epochs=1).fit(Scripted(), loader())
    names = [n for n in saved(tmp_path) if n.endswith(".ckpt")]
    assert names == ["last-v1.ckpt", "last.ckpt", "mine-v1.ckpt", "mine.ckpt"]
    assert callback.best_model_path == str(tmp_path / "mine-v1.ckpt")
    assert callback.last_model_path == str(tmp_path / "last-v1.ckpt")


def test_a_name_without_metrics_moves_between_versions(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "best", "val_score")
    trainer(tmp_path, callback, max_epochs=2).fit(Scripted([2, 1]), loader(), loader(2))
    assert [n for n in saved(tmp_path) if n.endswith(".ckpt")] == ["best-v1.ckpt"]
    assert global_step(callback.best_model_path) == 2 * BATCHES


def test_one_object_in_two_trainers_leaves_the_first_runs_checkpoints_alone(tmp_path: Path) -> None:
    callback = ModelCheckpoint()
    for _ in range(2):
        trainer(tmp_path, callback, max_epochs=1).fit(Scripted(), loader())
    for version in (0, 1):
        assert saved(tmp_path / f"version_{version}" / "checkpoints") == [f"epoch=0-step={BATCHES}.ckpt"]


def test_a_second_fit_of_one_trainer_saves_its_own_best(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "saved", monitor="val_score")
    run = trainer(tmp_path, callback, max_epochs=1)
    for score, name in ((1, f"epoch=0-step={BATCHES}.ckpt"), (2, f"epoch=0-step={BATCHES}-v1.ckpt")):
        run.fit(Scripted([score]), loader(), loader(2))
        assert callback.best_model_path == str(tmp_path / "saved" / name)
        assert callback.best_model_score == score
    assert len(saved(tmp_path / "saved")) == 2


def test_a_resumed_run_leaves_what_another_run_saved_under_a_name_that_it_had_given_up(tmp_path: Path) -> None:
    folder = tmp_path / "shared"

    def train(steps: int, ckpt_path: str | None = None) -> None:
        callback = ModelCheckpoint(folder, "{step}", every_n_train_steps=1)
        trainer(tmp_path, callback, max_steps=steps).fit(Scripted(), loader(), ckpt_path=ckpt_path)

    train(2)
    train(1)  # step=1 is a free name again
    train(4, str(folder / "step=2.ckpt"))
    assert saved(folder) == ["step=1.ckpt", "step=2.ckpt", "step=4.ckpt"]  # 2: what this process resumed from
    train(5, str(folder / "step=4.ckpt"))
    assert saved(folder) == ["step=1.ckpt", "step=4.ckpt", "step=5.ckpt"]


def test_a_resumed_run_replaces_what_was_saved_before_checkpoints_said_whose_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "saved"

    def train(steps: int, ckpt_path: str | None = None) -> None:
        callback = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_last=True)
        trainer(tmp_path, callback, max_steps=steps).fit(Scripted(), loader(), ckpt_path=ckpt_path)

    train(1)
    manifest = folder / "step=1.ckpt" / "manifest.json"
    record = json.loads(manifest.read_text())
    del record["meta"]["run"], record["crc32"]
    manifest.write_bytes(write_json({**record, "crc32": zlib.crc32(write_json(record))}))
    train(2, str(folder / "step=1.ckpt"))
    train(3, str(folder / "step=2.ckpt"))
    assert saved(folder) == ["last.ckpt", "step=2.ckpt", "step=3.ckpt"]


def test_runs_that_save_at_once_do_not_take_each_others_names(tmp_path: Path) -> None:
    def last() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "mine", every_n_train_steps=1, save_last=True)

    inner, outer = last(), last()

    class Meanwhile(Callback):
        """Another run, from the choice of the first names to the writing."""

        def on_save_checkpoint(self, run: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
            if run.global_step == 1:
                trainer(tmp_path, inner, max_steps=1).fit(Scripted(), loader())

    trainer(tmp_path, Meanwhile(), outer, max_steps=3).fit(Scripted(), loader())
    assert inner.last_model_path != outer.last_model_path
    for callback, step in ((inner, 1), (outer, 3)):
        assert global_step(resolve_pointer(callback.last_model_path)) == step
        assert global_step(callback.best_model_path) == step


def test_a_resumed_run_goes_on_with_the_best_of_before(tmp_path: Path) -> None:
    def callback() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{epoch}", "val_score", save_top_k=2, save_last=True)

    first = callback()
    trainer(tmp_path, first, max_epochs=3).fit(Scripted([3, 1, 2]), loader(), loader(2))
    second = callback()
    trainer(tmp_path, second, max_epochs=5).fit(Scripted([5, 0]), loader(), loader(2), ckpt_path=first.last_model_path)
    assert second.best_model_path == str(tmp_path / "epoch=4.ckpt")
    assert sorted(os.path.basename(path) for path in second.best_k_models) == ["epoch=1.ckpt", "epoch=4.ckpt"]
    kept = [n for n in saved(tmp_path) if n.endswith(".ckpt")]
    assert kept == ["epoch=1.ckpt", "epoch=2.ckpt", "epoch=4.ckpt", "last.ckpt"]  # 2: what this process resumed from

    third = callback()
    trainer(tmp_path, third, max_epochs=6).fit(Scripted([9]), loader(), loader(2), ckpt_path=second.last_model_path)
    kept = [n for n in saved(tmp_path) if n.endswith(".ckpt")]
    assert kept == ["epoch=1.ckpt", "epoch=4.ckpt", "epoch=5.ckpt", "last.ckpt"]


def test_a_checkpoint_knows_itself(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{epoch}", "val_score", save_last=True)
    trainer(tmp_path, callback, max_epochs=2).fit(Scripted([2, 1]), loader(), loader(2))
    again = ModelCheckpoint(tmp_path, "{epoch}", "val_score", save_last=True)
    trainer(tmp_path, again, max_epochs=2).fit(Scripted(), loader(), loader(2), ckpt_path=callback.best_model_path)
    for name in ("best_model_path", "best_model_score", "last_model_path", "kth_best_model_path", "best_k_models"):
        assert getattr(again, name) == getattr(callback, name)


def test_in_another_folder_only_the_best_path_is_taken_over(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "a", "{epoch}", "val_score")
    trainer(tmp_path, callback, max_epochs=1).fit(Scripted([2]), loader(), loader(2))
    other = ModelCheckpoint(tmp_path / "b", "{epoch}", "val_score")
    with pytest.warns(UserWarning, match="left alone"):
        trainer(tmp_path, other, max_epochs=2).fit(
            Scripted([3]), loader(), loader(2), ckpt_path=callback.best_model_path
        )
    assert saved(tmp_path / "a") == ["epoch=0.ckpt"]
    assert other.best_model_path == str(tmp_path / "b" / "epoch=1.ckpt")


def test_an_exception_can_be_saved(tmp_path: Path) -> None:
    class Failing(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.global_step == 3:
                raise RuntimeError("bad batch")
            return super().training_step(batch, batch_idx)

    callback = ModelCheckpoint(tmp_path, "{step}", save_on_exception=True)
    with pytest.raises(RuntimeError, match="bad batch"):
        trainer(tmp_path, callback).fit(Failing(), loader())
    assert global_step(str(tmp_path / "step=3.ckpt")) == 3
    trainer(tmp_path, max_epochs=1).fit(Scripted(), loader(), ckpt_path=tmp_path / "step=3.ckpt")


def test_weights_only_checkpoints_hold_no_optimizer(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{epoch}", save_weights_only=True)
    trainer(tmp_path, callback, max_epochs=1).fit(Scripted(), loader())
    assert "optimizer.safetensors" not in saved(tmp_path / "epoch=0.ckpt")
    assert isinstance(Scripted.load_from_checkpoint(callback.best_model_path), Scripted)


def test_it_saves_into_a_store() -> None:
    root = f"memory://{uuid.uuid4()}"
    callback = ModelCheckpoint(monitor="val_score", save_last=True)
    run = trainer(root, callback, max_epochs=3)
    run.fit(Scripted([3, 2, 1]), loader(), loader(2))
    assert callback.best_model_path == f"{run.log_dir}/checkpoints/epoch=2-step=24.ckpt"
    assert callback.last_model_path == f"{run.log_dir}/checkpoints/last.ckpt"
    again = trainer(root, max_epochs=4)
    again.fit(Scripted(), loader(), ckpt_path=callback.last_model_path)
    assert again.current_epoch == 4


def test_verbose_tells_what_is_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "paceline"):
        callback = ModelCheckpoint(tmp_path, "{epoch}", "val_score", verbose=True)
        trainer(tmp_path, callback, max_epochs=1).fit(Scripted([0.5]), loader(), loader(2))
    assert "Epoch 0, global step 8: 'val_score' reached 0.50000 (best 0.50000), saving model to" in caplog.text


def test_a_save_by_steps_that_meets_a_validation_waits_for_its_metric_also_inside_an_epoch(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "{step}", "val_score", every_n_train_steps=4, save_top_k=-1)
    assert steps_saved(tmp_path, callback, val_check_interval=4) == [4, 8, 12, 16]
    assert [float(score) for score in callback.best_k_models.values()] == [9, 8, 7, 6]


def test_a_run_resumed_between_a_save_and_its_validation_saves_what_waited(tmp_path: Path) -> None:
    def callbacks() -> list[ModelCheckpoint]:
        waiting = ModelCheckpoint(tmp_path / "best", "{step}", "val_score", every_n_train_steps=4)
        return [waiting, ModelCheckpoint(tmp_path / "all", "{step}", every_n_train_steps=2, save_top_k=-1)]

    options = {"val_check_interval": 4, "max_epochs": 1}
    trainer(tmp_path, *callbacks(), **options).fit(Scripted([1]), loader(), loader(2))
    waiting, _ = callbacks()
    run = trainer(tmp_path, waiting, **{**options, "max_steps": 5})
    run.fit(Scripted([0.5]), loader(), loader(2), ckpt_path=tmp_path / "all" / "step=4.ckpt")
    assert global_step(waiting.best_model_path) == 4
    assert waiting.best_model_score == 0.5


# --- several ranks -------------------------------------------------------------------------------------------------
class Uneven(Scripted):
    """The ranks' scores have the means 5, 5.5 and 4, which is no rank's own order."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        scores = ([1.0, 9.0, 4.0], [9.0, 2.0, 4.0])[self.global_rank]
        self.log("val_score", scores[self.validations])


def save_the_best_on_two_ranks(folder: str) -> tuple[list[int], dict[str, float], list[str]]:
    notes = Saves()
    callback = ModelCheckpoint(folder, "{epoch}-{val_score:.1f}", "val_score", save_top_k=2, save_last=True)
    run = trainer(folder, notes, callback, strategy="ddp", devices=2, max_epochs=3)
    run.fit(Uneven(), loader(4), loader(4))
    run.strategy.barrier()
    paths = {os.path.basename(path): float(score) for path, score in callback.best_k_models.items()}
    return notes.steps, paths, saved(folder)


def test_all_ranks_decide_alike_by_global_metrics(tmp_path: Path) -> None:
    first, second = run_ranks(save_the_best_on_two_ranks, 2, str(tmp_path))
    assert first == second
    steps, paths, files = first
    assert len(steps) == 3
    assert paths == {"epoch=0-val_score=5.0.ckpt": 5.0, "epoch=2-val_score=4.0.ckpt": 4.0}
    assert [n for n in files if n.endswith(".ckpt")] == [*paths, "last.ckpt"]


class Fast(Callback):
    """Makes the clock of rank 1 run an hour ahead."""

    def __init__(self, clock: AgreedClock) -> None:
        self.clock = clock

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.Module, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 0:
            self.clock._started -= 3600


def save_by_time_on_two_ranks(folder: str) -> list[int]:
    notes, callback = Saves(), ModelCheckpoint(folder, train_time_interval=timedelta(seconds=0.05))
    assert callback._clock is not None
    run = trainer(folder, notes, Fast(callback._clock), callback, strategy="ddp", devices=2)
    run.fit(Scripted(), loader(128))
    return notes.steps


def test_all_ranks_save_by_the_clock_of_rank_0(tmp_path: Path) -> None:
    first, second = run_ranks(save_by_time_on_two_ranks, 2, str(tmp_path))
    assert first == second
    assert 1 < len(first) < 128


# --- time, agreed on by all ranks ----------------------------------------------------------------------------------
def test_asking_for_the_time_gets_closer_in_halves() -> None:
    assert steps_to_wait(elapsed=1.0, steps=10, interval=100.0) == 10  # never more than were seen
    assert steps_to_wait(elapsed=90.0, steps=900, interval=100.0) == 50
    assert steps_to_wait(elapsed=99.99, steps=1000, interval=100.0) == 1
    assert steps_to_wait(elapsed=0.0, steps=4, interval=100.0) == 2


def test_an_hour_of_steps_asks_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("paceline.trainer.agreed_clock.time.monotonic", lambda: now[0])
    asked, clock = [], AgreedClock(3600.0)

    class Alone:
        def broadcast_object(self, value: float) -> float:
            asked.append(value)
            return value

    clock.start(0)
    for step in range(1, 100_000):
        now[0] = step * 0.1
        if clock.is_over(step, Alone()):  # type: ignore[arg-type]
            break
    assert step == 36_000
    assert len(asked) < 40
