"""What Lightning's users expect of a Trainer beyond the loops themselves; each was compared with Lightning 2.6."""

from __future__ import annotations

import math
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import paceline as pl
from paceline.callbacks import LearningRateMonitor, ModelSummary, Profiler, TQDMProgressBar
from paceline.errors import ConfigurationError
from paceline.loggers import CSVLogger

from helpers.ranks import run_ranks
from helpers.tiny import Sums, numbers, tiny_trainer


class Noting(pl.Callback):
    """Notes what `read(trainer)` gives in the hooks named."""

    def __init__(self, read: Any, *hooks: str) -> None:
        self.seen: list[Any] = []
        for hook in hooks:
            setattr(self, hook, lambda trainer, *_: self.seen.append(read(trainer)))


class Validated(Sums):
    """Notes after which updates it was validated."""

    def __init__(self) -> None:
        super().__init__()
        self.after: list[int] = []

    def on_validation_start(self) -> None:
        self.after.append(self.global_step)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


# --- validation by the clock -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("given", ["00:00:00:01", timedelta(seconds=1), {"seconds": 1}])
def test_a_validation_interval_may_be_a_time_in_three_forms(given: Any) -> None:
    assert tiny_trainer(val_check_interval=given).val_check_interval == timedelta(seconds=1)


@pytest.mark.parametrize("given", ["1:2", "00:00:00:00", {"fortnights": 1}, timedelta(seconds=-1), 0, -3, 1.5])
def test_an_interval_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(ConfigurationError, match="val_check_interval"):
        tiny_trainer(val_check_interval=given)


def validations_by_a_clock(monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> list[int]:
    """After which updates validation ran, where each update takes a second and a validation ten."""
    now = [0.0]
    monkeypatch.setattr("paceline.trainer.agreed_clock.time.monotonic", lambda: now[0])

    class Ticking(Validated):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            now[0] += 1

        def on_validation_end(self) -> None:
            now[0] += 10

    module = Ticking()
    tiny_trainer(num_sanity_val_steps=0, **arguments).fit(module, numbers(20), numbers(2))
    return module.after


def test_validation_runs_when_the_time_since_the_last_one_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    after = validations_by_a_clock(monkeypatch, max_epochs=2, val_check_interval={"seconds": 6})
    assert after[0] == 6
    assert [later - earlier for earlier, later in pairwise(after)] == [7, 7]  # counted from the update after its end


def test_a_long_time_means_no_validation_at_the_epochs_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert validations_by_a_clock(monkeypatch, max_epochs=2, val_check_interval={"hours": 1}) == []


def steps_of_validation() -> list[int]:
    module = Validated()
    trainer = tiny_trainer(
        max_epochs=3, val_check_interval={"milliseconds": 1}, strategy="ddp", num_sanity_val_steps=0, devices=2
    )
    trainer.fit(module, numbers(40), numbers(4))
    return module.after


def test_all_ranks_validate_by_time_after_the_same_update() -> None:
    first, second = run_ranks(steps_of_validation, 2)
    assert first == second
    assert first


def test_without_epochs_to_count_and_without_an_interval_each_epoch_ends_with_validation() -> None:
    module = Validated()
    tiny_trainer(max_epochs=2, check_val_every_n_epoch=None, num_sanity_val_steps=0).fit(module, numbers(6), numbers(2))
    assert module.after == [3, 6]


# --- a trial run -----------------------------------------------------------------------------------------------------
def test_a_trial_run_validates_once_at_its_end_whatever_the_intervals_say() -> None:
    module = Validated()
    trainer = tiny_trainer(fast_dev_run=True, val_check_interval=10, check_val_every_n_epoch=5)
    trainer.fit(module, numbers(6), numbers(2))
    assert module.after == [1]
    assert (trainer.val_check_interval, trainer.check_val_every_n_epoch) == (1.0, 1)
    assert trainer.num_sanity_val_batches == [0]


def test_code_that_uses_the_logger_works_in_a_trial_run_and_writes_nothing(tmp_path: Any) -> None:
    class Logs(Sums):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.logger.experiment.add_scalar("a", 1.0)
            self.logger.log_metrics({"a": 1.0}, step=0)
            self.logger.log_image("b", [])
            return super().training_step(batch, batch_idx)

    tiny_trainer(fast_dev_run=True, logger=True, callbacks=[LearningRateMonitor()]).fit(Logs(), numbers(4))
    assert list(tmp_path.iterdir()) == []


# --- properties ------------------------------------------------------------------------------------------------------
def test_a_call_that_failed_was_interrupted_until_the_next_one_is_made() -> None:
    class Fails(Sums):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyboardInterrupt

    trainer = tiny_trainer()
    assert not trainer.interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(Fails(), numbers(4))
    assert trainer.interrupted
    trainer.validate(Validated(), numbers(4), verbose=False)
    assert not trainer.interrupted


def test_the_run_counts_as_finished_only_after_the_teardown() -> None:
    noting = Noting(lambda trainer: trainer.state.finished, "teardown")
    trainer = tiny_trainer(callbacks=[noting])
    trainer.fit(Sums(), numbers(4))
    assert noting.seen == [False]
    assert trainer.state.finished


def test_the_number_of_training_batches_is_infinite_until_it_is_known() -> None:
    assert tiny_trainer().num_training_batches == math.inf


def test_each_stage_keeps_its_number_of_batches() -> None:
    class All(Validated):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def predict_step(self, batch: Any, batch_idx: int) -> None:
            pass

    trainer = tiny_trainer()
    trainer.fit(All(), numbers(4), numbers(6))
    trainer.test(All(), numbers(8), verbose=False)
    trainer.predict(All(), numbers(2))
    assert (trainer.num_val_batches, trainer.num_test_batches, trainer.num_predict_batches) == ([3], [4], [1])


def test_a_limit_that_cannot_be_kept_leaves_the_trainer_readable() -> None:
    trainer = tiny_trainer(limit_train_batches=0.1)
    with pytest.raises(ConfigurationError, match="limit_train_batches"):
        trainer.fit(Sums(), numbers(4))
    assert trainer.num_training_batches == math.inf


def test_a_time_limit_that_stops_the_run_is_a_stop_that_can_be_read() -> None:
    trainer = tiny_trainer(max_epochs=-1, max_time={"milliseconds": 1})
    trainer.fit(Sums(), numbers(4))
    assert trainer.should_stop


# --- data ------------------------------------------------------------------------------------------------------------
def test_the_number_of_steps_is_known_from_setup_on_and_the_loader_is_made_once() -> None:
    class Asks(Sums):
        made = 0

        def setup(self, stage: str) -> None:
            self.steps = self.trainer.estimated_stepping_batches

        def train_dataloader(self) -> Any:
            self.made += 1
            return numbers(6)

    module = Asks()
    tiny_trainer(max_epochs=4).fit(module)
    assert (module.steps, module.made) == (12, 1)


def test_outside_of_fit_the_number_of_steps_is_as_far_as_known() -> None:
    assert tiny_trainer(max_epochs=2).estimated_stepping_batches == math.inf
    assert tiny_trainer(max_steps=5).estimated_stepping_batches == 5


def test_another_logger_takes_the_place_of_all(tmp_path: Path) -> None:
    trainer = tiny_trainer(logger=[CSVLogger(tmp_path, "a"), CSVLogger(tmp_path, "b")])
    third = CSVLogger(tmp_path, "c")
    trainer.logger = third
    assert (trainer.loggers, trainer.callbacks.count(third)) == ([third], 1)
    trainer.loggers = []
    assert trainer.logger is None


@pytest.mark.parametrize(("step", "data"), [(True, False), (False, True)])
def test_half_a_validation_is_a_warning(step: bool, data: bool) -> None:
    module = Validated() if step else Sums()
    with pytest.warns(UserWarning, match=r"fit\(\) does not validate"):
        tiny_trainer().fit(module, numbers(2), numbers(2) if data else None)


class Remembers(pl.DataModule):
    """Makes its loader from what it remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def train_dataloader(self) -> Any:
        self.calls.append("train_dataloader")
        return numbers(4)

    def state_dict(self) -> dict[str, Any]:
        return {"a": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls.append("load_state_dict")


def test_a_data_module_has_its_state_back_before_its_loader_is_asked_for() -> None:
    trainer = tiny_trainer(max_epochs=1)
    trainer.fit(Sums(), datamodule=Remembers())
    trainer.save_checkpoint("a.ckpt")
    datamodule = Remembers()
    tiny_trainer(max_epochs=2).fit(Sums(), datamodule=datamodule, ckpt_path="a.ckpt")
    assert datamodule.calls == ["load_state_dict", "train_dataloader"]


def test_a_resumed_run_that_asked_for_its_steps_in_setup_still_trains_in_the_saved_order() -> None:
    class Asks(Sums):
        def setup(self, stage: str) -> None:
            self.trainer.estimated_stepping_batches

    def run(seed: int, epochs: int, **options: Any) -> tuple[list[list[int]], pl.Trainer]:
        pl.seed_everything(seed)
        module, trainer = Asks(), tiny_trainer(max_epochs=epochs)
        trainer.fit(module, numbers(6, shuffle=True), **options)
        return module.seen, trainer

    straight, _ = run(1, 2)
    _, trainer = run(1, 1)
    trainer.save_checkpoint("a.ckpt")
    resumed, _ = run(2, 2, ckpt_path="a.ckpt")
    assert resumed == straight[3:]


def test_an_evaluation_without_a_batch_runs_no_hook_and_returns_nothing() -> None:
    noting = Noting(lambda trainer: "called", "on_validation_start", "on_validation_epoch_end", "on_validation_end")
    trainer = tiny_trainer(limit_val_batches=0, limit_predict_batches=0, callbacks=[noting])
    assert trainer.validate(Validated(), numbers(4), verbose=False) == []
    assert trainer.predict(Sums(), numbers(4)) == []
    assert noting.seen == []


def test_evaluation_returns_what_goes_to_the_loggers_under_the_names_of_epochs() -> None:
    class Logs(Validated):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("both", 1.0, on_step=True, on_epoch=True)
            self.log("hidden", 2.0, logger=False)

    trainer = tiny_trainer()
    assert trainer.validate(Logs(), numbers(4), verbose=False) == [{"both_epoch": 1.0}]
    assert trainer.callback_metrics["both"] == 1
    assert trainer.callback_metrics["hidden"] == 2


# --- switches --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "inside"),
    [
        ({}, (False, False, False)),
        ({"deterministic": True}, (True, False, False)),
        ({"deterministic": "warn"}, (True, True, False)),
        ({"benchmark": True}, (False, False, True)),
        ({"deterministic": True, "benchmark": True}, (True, False, True)),
    ],
)
def test_torchs_switches_are_turned_for_the_call_and_put_back(arguments: Any, inside: tuple[bool, ...]) -> None:
    def switches(*_: Any) -> tuple[bool, ...]:
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        return torch.are_deterministic_algorithms_enabled(), warns, torch.backends.cudnn.benchmark

    noting = Noting(switches, "on_train_start")
    tiny_trainer(callbacks=[noting], **arguments).fit(Sums(), numbers(4))
    assert noting.seen == [inside]
    assert switches() == (False, False, False)


def test_switches_are_put_back_after_an_exception_too() -> None:
    class Fails(Sums):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        tiny_trainer(deterministic=True).fit(Fails(), numbers(4))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("kind", ["simple", "advanced", "pytorch"])
def test_a_profiler_may_be_given_by_name(kind: str) -> None:
    trainer = tiny_trainer(profiler=kind)
    assert isinstance(trainer.profiler, Profiler)
    assert trainer.profiler.kind == kind
    assert trainer.profiler in trainer.callbacks


def test_a_profiler_object_joins_the_callbacks_once() -> None:
    profiler = Profiler("simple")
    assert tiny_trainer(profiler=profiler, callbacks=[profiler]).callbacks.count(profiler) == 1
    assert tiny_trainer(profiler=profiler).profiler is profiler


def test_the_summary_is_there_unless_it_is_switched_off_or_brought_along() -> None:
    def summaries(**arguments: Any) -> list[Any]:
        return [cb for cb in tiny_trainer(**arguments).callbacks if isinstance(cb, ModelSummary)]

    own = ModelSummary(max_depth=2)
    assert len(summaries(enable_model_summary=True)) == 1
    assert summaries(enable_model_summary=False) == []
    assert summaries(enable_model_summary=True, callbacks=[own]) == [own]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"profiler": "foo"}, "simple, advanced, pytorch"),
        ({"num_nodes": 0}, "num_nodes=0"),
        ({"num_nodes": "2"}, "num_nodes='2'"),
        ({"deterministic": "yes"}, "'warn'"),
        ({"accumulate_grad_batches": {0: 2}}, "GradientAccumulationScheduler"),
        ({"enable_progress_bar": True, "callbacks": [TQDMProgressBar(), TQDMProgressBar()]}, "2 progress bars"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_what_to_write(arguments: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        tiny_trainer(**arguments)


def test_bare_bones_log_nothing() -> None:
    class Logs(Sums):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("a", 1.0)
            return super().training_step(batch, batch_idx)

    trainer = pl.Trainer(barebones=True, max_epochs=1, accelerator="cpu", devices=1)
    trainer.fit(Logs(), numbers(4))
    assert trainer.barebones
    assert trainer.callback_metrics == {}


def spoken() -> list[Any]:
    strategy = tiny_trainer(strategy="ddp", devices=2, max_epochs=1)
    strategy.fit(Sums(), numbers(8))
    talk = strategy.strategy
    talk.barrier("a name")
    mean = talk.reduce(torch.tensor(float(talk.global_rank)))
    total = talk.reduce(torch.tensor(1.0), reduce_op="sum")
    return [talk.broadcast({"rank": talk.global_rank}), mean.item(), total.item(), str(talk.root_device)]


def test_ranks_talk_by_lightnings_names() -> None:
    assert run_ranks(spoken, 2) == [[{"rank": 0}, 0.5, 2.0, "cpu"]] * 2
