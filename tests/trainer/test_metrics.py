"""`self.log`: which names there are, what they hold and when, which points the loggers get, and what is refused.

`Points` keeps what `on_log` delivers. Metrics over several ranks are at the end.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import paceline as pl
from paceline.errors import ConfigurationError

from helpers.ranks import RanksFailed, run_ranks
from helpers.tiny import Regression, Sums, global_batches, loader, numbers, tiny_trainer


class Points(pl.Callback):
    """Every point: (step, what was logged), without `epoch` and `samples`, which are in `where`."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.where: list[tuple[int, int, int]] = []

    def on_log(self, trainer: Any, pl_module: Any, metrics: dict[str, float], step: int) -> None:
        self.where.append((step, int(metrics["epoch"]), int(metrics["samples"])))
        self.points.append((step, {name: v for name, v in metrics.items() if name not in ("epoch", "samples")}))

    def of(self, name: str) -> dict[int, float]:
        """step → value of one name."""
        return {step: metrics[name] for step, metrics in self.points if name in metrics}


class Logs(Sums):
    """Logs the first number of each batch as `x`, with the options given."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("x", batch[0].float(), **self.options)
        return super().training_step(batch, batch_idx)


def fit(module: pl.Module, data: Any, *callbacks: Any, val: Any = None, **arguments: Any) -> pl.Trainer:
    trainer = tiny_trainer(callbacks=list(callbacks), **arguments)
    trainer.fit(module, data, val)
    return trainer


# --- points ---------------------------------------------------------------------------------------------------------
def test_points_are_at_step_one_every_log_every_n_steps_and_the_end_of_each_epoch() -> None:
    points = Points()
    fit(Logs(), numbers(14), points, max_epochs=2, log_every_n_steps=3)  # 7 batches an epoch
    assert [step for step, _ in points.points] == [1, 3, 6, 7, 9, 12, 14]
    assert points.of("x") == {1: 0, 3: 4, 6: 10, 7: 12, 9: 2, 12: 8, 14: 12}


def test_a_point_carries_step_epoch_and_samples_with_this_update_included() -> None:
    points = Points()
    fit(Logs(), numbers(5), points, max_epochs=2, log_every_n_steps=1)
    assert points.where == [(1, 0, 2), (2, 0, 4), (3, 0, 5), (4, 1, 7), (5, 1, 9), (6, 1, 10)]


def test_the_default_is_a_point_every_50_steps() -> None:
    points = Points()
    fit(Logs(), numbers(110, batch_size=1), points)
    assert [step for step, _ in points.points] == [1, 50, 100, 110]


def test_steps_count_windows_not_batches() -> None:
    points = Points()
    fit(Logs(), numbers(12), points, accumulate_grad_batches=2, log_every_n_steps=2)
    assert points.of("x") == {1: 1, 2: 5, 3: 9}  # means over the two micro-batches of each window


def test_an_on_step_point_is_the_mean_over_its_window_weighted_with_the_batch_sizes() -> None:
    points = Points()
    fit(Logs(), numbers(5, batch_size=4), points, accumulate_grad_batches=2)
    assert points.of("x") == {1: pytest.approx((0 * 3 + 3 * 2) / 5)}  # cut into 3 and 2: sizes within one of each other


@pytest.mark.parametrize(("reduce_fx", "expected"), [("sum", 2.0), ("min", 0.0), ("max", 2.0), (torch.sum, 2.0)])
def test_reduce_fx_holds_for_the_window_too(reduce_fx: Any, expected: float) -> None:
    points = Points()
    fit(Logs(reduce_fx=reduce_fx), numbers(4), points, accumulate_grad_batches=2)
    assert points.of("x") == {1: expected}


def test_stopping_at_max_steps_ends_with_a_point() -> None:
    points = Points()
    fit(Logs(), numbers(14), points, max_epochs=None, max_steps=5, log_every_n_steps=3)
    assert [step for step, _ in points.points] == [1, 3, 5]


def test_a_step_that_logged_nothing_makes_no_point() -> None:
    class Sometimes(Sums):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx % 2:
                self.log("x", float(batch_idx))
            return super().training_step(batch, batch_idx)

    points = Points()
    fit(Sometimes(), numbers(10), points, log_every_n_steps=1)
    assert points.of("x") == {2: 1, 4: 3}
    assert len(points.points) == 2


def test_before_the_first_update_there_is_no_point_of_step_metrics() -> None:
    class Skips(Logs):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx == 2 else None

    points = Points()
    fit(Skips(), numbers(8), points, log_every_n_steps=1)
    assert points.of("x") == {1: 4}


def test_validation_carries_the_step_of_the_update_before_it() -> None:
    class Validates(Logs):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", 1.0)

    points = Points()
    fit(Validates(), numbers(10), points, val=numbers(2), val_check_interval=2)
    assert points.of("val") == {2: 1.0, 4: 1.0}


# --- names ----------------------------------------------------------------------------------------------------------
def test_both_flags_make_a_step_and_an_epoch_name_and_the_bare_one_for_callbacks() -> None:
    points = Points()
    trainer = fit(Logs(on_step=True, on_epoch=True, prog_bar=True), numbers(5), points, log_every_n_steps=1)
    mean = (0 * 2 + 2 * 2 + 4) / 5
    assert points.of("x_step") == {1: 0, 2: 2, 3: 4}
    assert points.of("x_epoch") == {3: pytest.approx(mean)}
    assert points.of("x") == {}
    assert set(trainer.callback_metrics) == {"x", "x_step", "x_epoch"}
    assert trainer.callback_metrics["x"] == trainer.callback_metrics["x_epoch"] == pytest.approx(mean)
    assert trainer.callback_metrics["x_step"] == 4
    assert set(trainer.logged_metrics) == {"x_step", "x_epoch"}
    assert trainer.progress_bar_metrics == pytest.approx({"x_step": 4.0, "x_epoch": mean})


def test_one_flag_keeps_the_bare_name() -> None:
    points = Points()
    trainer = fit(Logs(on_step=False, on_epoch=True), numbers(5), points, log_every_n_steps=1)
    assert points.points == [(3, {"x": pytest.approx(1.6)})]
    assert set(trainer.callback_metrics) == set(trainer.logged_metrics) == {"x"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0 * 2 + 2 * 2 + 4 * 1) / 5),
        ({"batch_size": 1}, 2.0),
        ({"reduce_fx": "mean", "batch_size": 3}, 2.0),
        ({"reduce_fx": "sum"}, 6.0),
        ({"reduce_fx": "min"}, 0.0),
        ({"reduce_fx": "max"}, 4.0),
        ({"reduce_fx": torch.mean}, 1.6),
        ({"reduce_fx": max}, 4.0),
        ({"sync_dist": True, "sync_dist_group": None, "enable_graph": False}, 1.6),
    ],
)
def test_epoch_values_are_weighted_means_or_what_reduce_fx_says(options: dict[str, Any], expected: float) -> None:
    trainer = fit(Logs(on_step=False, on_epoch=True, **options), numbers(5))
    assert trainer.callback_metrics["x"] == pytest.approx(expected)


def test_each_epoch_starts_anew() -> None:
    points = Points()
    fit(Logs(on_step=False, on_epoch=True, reduce_fx="sum"), numbers(6), points, max_epochs=3)
    assert points.of("x") == {3: 6, 6: 6, 9: 6}


TRAINING_HOOKS = {
    "on_train_start": "epoch",
    "on_train_epoch_start": "epoch",
    "on_train_batch_start": "step",
    "training_step": "step",
    "on_before_zero_grad": "step",
    "on_before_backward": "step",
    "on_after_backward": "step",
    "on_before_optimizer_step": "step",
    "on_train_batch_end": "step",
    "on_train_epoch_end": "epoch",
}


def logging_in(hook: str, base: type[pl.Module], **options: Any) -> pl.Module:
    """A module that logs `x` in `hook`, after what the hook of `base` does."""

    def logs(self: Any, *args: Any) -> Any:
        self.log("x", 1.0, **options)
        return None if hook.endswith("idation_step") or hook == "test_step" else getattr(super(kind, self), hook)(*args)

    kind = type("LogsInAHook", (base,), {hook: logs})
    return kind()


@pytest.mark.parametrize(("hook", "when"), TRAINING_HOOKS.items())
def test_the_default_of_a_hook_in_training(hook: str, when: str) -> None:
    points = Points()
    fit(logging_in(hook, Sums), numbers(4), points, log_every_n_steps=1, max_epochs=2)
    first_epoch_only = hook == "on_train_start"
    steps = {1, 2, 3, 4} if when == "step" else {2} if first_epoch_only else {2, 4}
    assert points.of("x") == dict.fromkeys(steps, 1.0)


class Evaluates(Sums):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize("stage", ["validation", "test"])
@pytest.mark.parametrize(
    "hook", ["on_{}_start", "on_{}_epoch_start", "on_{}_batch_start", "{}_step", "on_{}_batch_end", "on_{}_epoch_end"]
)
def test_hooks_of_evaluation_log_for_the_epoch(stage: str, hook: str) -> None:
    points = Points()
    trainer = tiny_trainer(callbacks=points)
    run = trainer.validate if stage == "validation" else trainer.test
    module = logging_in(hook.format(stage), Evaluates)
    assert run(module, numbers(6), verbose=False) == [{"x": 1.0}]
    assert points.points == [(0, {"x": 1.0})]


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_epoch_end", "on_train_start"])
def test_on_step_in_an_epoch_hook_is_refused(hook: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"on_step=True\) cannot be used in {hook}. Use on_epoch=True"):
        fit(logging_in(hook, Sums, on_step=True), numbers(4))


@pytest.mark.parametrize("hook", ["on_fit_start", "on_fit_end", "on_train_end", "configure_optimizers", "setup"])
def test_logging_where_there_is_no_step_and_no_epoch_is_refused(hook: str) -> None:
    with pytest.raises(ConfigurationError, match=r"log\('x'\) cannot be used in .*Log in training_step"):
        fit(logging_in(hook, Sums), numbers(4))


def test_logging_in_predict_step_is_refused() -> None:
    class Predicts(Sums):
        def predict_step(self, batch: Any, batch_idx: int) -> None:
            self.log("x", 1.0)

    with pytest.raises(ConfigurationError, match=r"log\('x'\) cannot be used in predict_step"):
        tiny_trainer().predict(Predicts(), numbers(4))


def test_the_same_name_with_other_flags_in_one_hook_is_refused() -> None:
    class Twice(Sums):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("x", 1.0, prog_bar=True)
            self.log("x", 1.0)

    with pytest.raises(ConfigurationError, match=r"log\('x'\) is called in training_step with two sets of options"):
        fit(Twice(), numbers(4))


def test_the_same_name_may_be_logged_in_two_hooks() -> None:
    class InBoth(Sums):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("x", 1.0)
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            self.log("x", 2.0)

    assert fit(InBoth(), numbers(4)).callback_metrics["x"] == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "x", "value": 1.0, "on_step": False, "on_epoch": False}, "logs nothing. Set one of the two"),
        (
            {"name": "x", "value": 1.0, "reduce_fx": "median"},
            r"reduce_fx='median'\): use 'mean', 'sum', 'min' or 'max'",
        ),
        ({"name": "x", "value": torch.ones(3)}, r"log\('x'\) got a tensor of shape \(3,\)"),
        ({"name": "x", "value": "high"}, r"log\('x'\) got 'high' \(str\)"),
        ({"name": "x", "value": None}, r"log\('x'\) got None \(NoneType\)"),
        ({"name": "x", "value": {"a": 1.0}}, "Use log_dict for several values"),
        ({"name": "x", "value": [1.0]}, r"log\('x'\) got \[1.0\] \(list\)"),
        ({"name": "x/dataloader_idx_0", "value": 1.0}, "without '/dataloader_idx_'"),
        ({"name": 3, "value": 1.0}, "the name must be a string"),
    ],
)
def test_a_call_of_log_that_cannot_be_meant_is_refused(call: dict[str, Any], message: str) -> None:
    class Calls(Sums):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log(**call)

    with pytest.raises(ConfigurationError, match=message):
        fit(Calls(), numbers(4))


def test_logging_without_a_trainer_warns_and_does_nothing() -> None:
    with pytest.warns(UserWarning, match="not attached to a Trainer"):
        Sums().log("x", 1.0)


# --- values ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "value", [2, 2.0, True + 1, torch.tensor(2), torch.tensor([2.0]), torch.tensor([[2.0]], dtype=torch.float64)]
)
def test_any_single_number_is_logged(value: Any) -> None:
    class LogsIt(Sums):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("x", value, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    metrics = fit(LogsIt(), numbers(4)).callback_metrics
    assert {name: float(number) for name, number in metrics.items()} == {"x": 2, "x_step": 2, "x_epoch": 2}
    assert all(number.ndim == 0 for number in metrics.values())


def test_a_numpy_scalar_is_logged() -> None:
    numpy = pytest.importorskip("numpy")

    class LogsIt(Sums):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("x", numpy.float32(2.5))
            return super().training_step(batch, batch_idx)

    assert fit(LogsIt(), numbers(4)).callback_metrics["x"] == 2.5


def test_what_changes_in_place_after_log_is_logged_as_it_was() -> None:
    class InPlace(Sums):
        def __init__(self) -> None:
            super().__init__()
            self.running = torch.zeros(())

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.running += 1
            self.log("running", self.running, on_step=True, on_epoch=True)
            self.running *= 10
            return super().training_step(batch, batch_idx)

    points = Points()
    fit(InPlace(), numbers(4), points, log_every_n_steps=1)
    assert points.of("running_step") == {1: 1, 2: 11}
    assert points.of("running_epoch") == {2: 6}


def test_a_logged_loss_holds_no_graph() -> None:
    class Keeps(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

    trainer = fit(Keeps(), loader(4))
    assert not any(value.requires_grad for value in trainer.callback_metrics.values())


def test_low_precision_values_are_summed_in_a_wider_type() -> None:
    class Halves(Sums):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("x", torch.tensor(2049.0 if batch_idx else 2048.0, dtype=torch.float32).half(), on_epoch=True)
            self.log("sum", torch.tensor(1000.0).half(), reduce_fx="sum", on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    trainer = fit(Halves(), numbers(200, batch_size=1))
    assert trainer.callback_metrics["sum"] == 200_000  # half holds up to 65,504
    assert trainer.callback_metrics["x_epoch"] == 2048


def test_log_dict_logs_each_item_with_the_options() -> None:
    class Several(Sums):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log_dict({"a": 1.0, "b": torch.tensor(2.0)}, on_step=False, on_epoch=True, prog_bar=True)
            return super().training_step(batch, batch_idx)

    trainer = fit(Several(), numbers(4))
    assert trainer.progress_bar_metrics == {"a": 1.0, "b": 2.0}


# --- who holds what, and when ---------------------------------------------------------------------------------------
def test_logger_false_keeps_a_name_from_the_loggers_and_prog_bar_puts_it_into_the_bar() -> None:
    class Three(Sums):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("silent", 1.0, logger=False)
            self.log("bar", 2.0, prog_bar=True, logger=False)
            self.log("all", 3.0, prog_bar=True)
            return super().training_step(batch, batch_idx)

    points = Points()
    trainer = fit(Three(), numbers(4), points)
    assert points.points == [(1, {"all": 3.0}), (2, {"all": 3.0})]
    assert set(trainer.callback_metrics) == {"silent", "bar", "all"}
    assert set(trainer.logged_metrics) == {"all"}
    assert trainer.progress_bar_metrics == {"bar": 2.0, "all": 3.0}


class Reads(pl.Callback):
    """What the three views hold in the hooks named."""

    def __init__(self, *hooks: str) -> None:
        self.seen: list[tuple[str, dict[str, float]]] = []
        for hook in hooks:
            setattr(self, hook, self._reader(hook))

    def _reader(self, hook: str) -> Any:
        def read(trainer: Any, pl_module: Any, *_: Any) -> None:
            metrics = trainer.callback_metrics
            assert all(isinstance(value, Tensor) and value.ndim == 0 for value in metrics.values())
            self.seen.append((hook, {name: round(float(value), 6) for name, value in metrics.items()}))

        return read


def test_a_step_metric_is_there_at_once() -> None:
    reads = Reads("on_train_batch_end")
    fit(Logs(), numbers(6), reads)
    assert [metrics for _, metrics in reads.seen] == [{"x": 0}, {"x": 2}, {"x": 4}]


def test_an_epoch_metric_is_there_from_the_end_of_its_epoch_on() -> None:
    class Validates(Logs):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", float(batch_idx))

    hooks = ("validation_batch_end", "validation_epoch_end", "validation_end", "train_batch_end", "train_epoch_end")
    reads = Reads(*(f"on_{hook}" for hook in hooks))
    module = Validates(on_step=False, on_epoch=True)
    fit(module, numbers(4), reads, val=numbers(4), num_sanity_val_steps=0, max_epochs=1)
    assert reads.seen == [
        ("on_train_batch_end", {}),
        ("on_train_batch_end", {}),
        ("on_validation_batch_end", {}),
        ("on_validation_batch_end", {}),
        ("on_validation_epoch_end", {"val": 0.5}),
        ("on_validation_end", {"val": 0.5}),
        ("on_train_epoch_end", {"x": 1.0, "val": 0.5}),
    ]


def test_what_on_train_epoch_end_logs_is_there_for_callbacks_that_act_on_metrics() -> None:
    class LogsAtTheEnd(Sums):
        def on_train_epoch_end(self) -> None:
            self.log("late", 3.0)

    class Acts(Reads):
        acts_on_metrics = True

    reads = Acts("on_train_epoch_end")
    fit(LogsAtTheEnd(), numbers(4), reads)
    assert reads.seen == [("on_train_epoch_end", {"late": 3.0})]


def test_the_sanity_check_leaves_no_metrics() -> None:
    class Validates(Logs):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", 1.0)

    points, reads = Points(), Reads("on_train_start")
    fit(Validates(), numbers(4), points, reads, val=numbers(4))
    assert reads.seen == [("on_train_start", {})]
    assert list(points.of("val")) == [2]


def test_step_metrics_are_kept_apart_from_those_of_the_validation_between_them() -> None:
    class Validates(Logs):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", 1.0)

    points = Points()
    module = Validates(on_step=True, on_epoch=True)
    trainer = fit(module, numbers(8), points, val=numbers(6), val_check_interval=1, log_every_n_steps=1)
    assert points.of("x_step") == {1: 0, 2: 2, 3: 4, 4: 6}
    assert trainer.callback_metrics["x_epoch"] == 3


def test_callbacks_log_too() -> None:
    class LogsFromCallback(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("from_callback", float(batch_idx))
            self.log_dict({"a": 1.0}, on_epoch=True, on_step=False)
            pl_module.log("through_module", 5.0)

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.log("after_validation", 7.0)

    class Validates(Sums):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    points = Points()
    fit(Validates(), numbers(4), points, LogsFromCallback(), val=numbers(2))
    assert points.of("from_callback") == {1: 0, 2: 1}
    assert points.of("through_module") == {1: 5, 2: 5}
    assert points.of("a") == {2: 1}
    assert points.of("after_validation") == {2: 7}


def test_a_callback_that_logs_outside_a_run_is_told_so() -> None:
    with pytest.raises(RuntimeError, match="works while a Trainer runs"):
        pl.Callback().log("x", 1.0)


def test_a_submodule_that_is_a_module_itself_logs_too() -> None:
    class Inner(pl.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.log("inner", 4.0)
            return x

    class Outer(Sums):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.inner(batch)
            return super().training_step(batch, batch_idx)

    assert fit(Outer(), numbers(2)).callback_metrics["inner"] == 4


def test_the_norm_that_clipping_computed_is_logged_as_grad_norm() -> None:
    points = Points()
    fit(Regression(), loader(4), points, gradient_clip_val=0.1, log_every_n_steps=1)
    module = Regression()
    module.loss(global_batches(4, 2)[0]).backward()
    norm = torch.cat([p.grad.reshape(-1) for p in module.parameters()]).norm()
    assert points.of("grad_norm")[1] == pytest.approx(float(norm))


def test_metrics_of_one_call_do_not_reach_the_next() -> None:
    trainer = fit(Logs(), numbers(4))
    trainer.validate(logging_in("validation_step", Evaluates), numbers(4), verbose=False)
    assert set(trainer.callback_metrics) == {"x"}
    assert trainer.callback_metrics["x"] == 1


# --- evaluation -----------------------------------------------------------------------------------------------------
class EvaluatesNumbers(Sums):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("mean", batch.float().mean())
        self.log("alone", 1.0 + dataloader_idx, add_dataloader_idx=False) if dataloader_idx == 0 else None
        self.log("both", batch.float().mean(), on_step=True, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        self.log("whole", 9.0)


def test_several_loaders_add_their_number_to_the_names() -> None:
    trainer = tiny_trainer()
    results = trainer.validate(EvaluatesNumbers(), [numbers(5), numbers(3)], verbose=False)
    assert results == [
        {
            "mean/dataloader_idx_0": 2.0,
            "alone": 1.0,
            "both_epoch/dataloader_idx_0": 2.0,
            "whole": 9.0,
        },
        {
            "mean/dataloader_idx_1": 1.0,
            "both_epoch/dataloader_idx_1": 1.0,
            "whole": 9.0,
        },
    ]
    assert set(trainer.callback_metrics) == {
        "alone", "whole",
        *(f"{name}/dataloader_idx_{i}" for name in ("mean", "both", "both_step", "both_epoch") for i in (0, 1)),
    }  # fmt: skip


def test_one_loader_in_a_list_adds_nothing_to_the_names() -> None:
    results = tiny_trainer().validate(EvaluatesNumbers(), [numbers(5)], verbose=False)
    assert set(results[0]) == {"mean", "alone", "both_epoch", "whole"}


def test_one_name_for_several_loaders_is_refused() -> None:
    class OneName(Sums):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            self.log("loss", 1.0, add_dataloader_idx=False)

    with pytest.raises(ConfigurationError, match=r"log\('loss', add_dataloader_idx=False\).*loaders 0 and 1"):
        tiny_trainer().validate(OneName(), [numbers(2), numbers(2)], verbose=False)


def test_results_are_floats_of_what_was_logged_for_the_epoch() -> None:
    results = tiny_trainer().validate(EvaluatesNumbers(), numbers(5), verbose=False)
    assert all(type(value) is float for value in results[0].values())


# --- torchmetrics ---------------------------------------------------------------------------------------------------
class WithMetrics(Sums):
    """Logs metric objects; targets are 1, predictions 1 where the number is even."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.accuracy = torchmetrics.classification.BinaryAccuracy()
        self.val_accuracy = torchmetrics.classification.BinaryAccuracy()
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.accuracy((batch % 2 == 0).int(), torch.ones_like(batch))
        self.log("acc", self.accuracy, **self.options)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_accuracy.update((batch % 2 == 0).int(), torch.ones_like(batch))
        self.log("val_acc", self.val_accuracy)


def test_a_metric_object_is_computed_at_the_end_of_each_epoch_and_reset() -> None:
    points = Points()
    module = WithMetrics(on_step=False, on_epoch=True)
    trainer = fit(module, numbers(5, batch_size=3), points, val=numbers(3), max_epochs=2)
    assert points.of("acc") == {2: pytest.approx(3 / 5), 4: pytest.approx(3 / 5)}
    assert points.of("val_acc") == {2: pytest.approx(2 / 3), 4: pytest.approx(2 / 3)}
    assert trainer.callback_metrics["acc"] == pytest.approx(3 / 5)
    assert not module.accuracy._update_called


def test_a_metric_object_logged_by_step_gives_the_value_of_the_batch() -> None:
    points = Points()
    fit(WithMetrics(on_step=True, on_epoch=True), numbers(5, batch_size=3), points, log_every_n_steps=1)
    assert points.of("acc_step") == {1: pytest.approx(2 / 3), 2: pytest.approx(1 / 2)}
    assert points.of("acc_epoch") == {2: pytest.approx(3 / 5)}


def test_a_collection_of_metrics_is_logged_by_log_dict() -> None:
    class Collects(Sums):
        def __init__(self) -> None:
            super().__init__()
            kinds = torchmetrics.classification
            self.metrics = torchmetrics.MetricCollection([kinds.BinaryPrecision(), kinds.BinaryRecall()], prefix="val_")

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.metrics.update((batch % 2 == 0).int(), torch.ones_like(batch))
            self.log_dict(self.metrics)

    (results,) = tiny_trainer().validate(Collects(), numbers(5), verbose=False)
    assert results == pytest.approx({"val_BinaryPrecision": 1.0, "val_BinaryRecall": 3 / 5})


def test_metrics_of_a_collection_may_share_their_states() -> None:
    class Collects(Sums):
        def __init__(self) -> None:
            super().__init__()
            kinds = torchmetrics.classification
            self.metrics = torchmetrics.MetricCollection([kinds.BinaryAUROC(), kinds.BinaryAveragePrecision()])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.metrics.update(batch.float() / 8, (batch % 2 == 0).int())
            self.log_dict(self.metrics)

    module, straight = Collects(), Collects()
    straight.metrics.update(torch.arange(7) / 8, (torch.arange(7) % 2 == 0).int())
    for _ in range(2):
        (results,) = tiny_trainer().validate(module, numbers(7), verbose=False)
        assert results == pytest.approx({name: float(value) for name, value in straight.metrics.compute().items()})


def test_a_metric_object_with_several_values_is_refused() -> None:
    class Matrix(Sums):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = torchmetrics.classification.BinaryConfusionMatrix()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.matrix.update(batch % 2, batch % 2)
            self.log("matrix", self.matrix)

    with pytest.raises(ConfigurationError, match=r"log\('matrix'\) got a tensor of shape \(2, 2\)"):
        tiny_trainer().validate(Matrix(), numbers(4), verbose=False)


def test_the_value_of_a_metric_object_may_be_logged_by_hand() -> None:
    class ByHand(WithMetrics):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.val_accuracy.update((batch % 2 == 0).int(), torch.ones_like(batch))

        def on_validation_epoch_end(self) -> None:
            self.log("val_acc", self.val_accuracy.compute())
            self.val_accuracy.reset()

    (results,) = tiny_trainer().validate(ByHand(), numbers(5), verbose=False)
    assert results == pytest.approx({"val_acc": 3 / 5})


def test_the_sanity_check_leaves_metric_objects_as_they_were() -> None:
    points = Points()
    fit(WithMetrics(on_step=False, on_epoch=True), numbers(2), points, val=numbers(6), num_sanity_val_steps=1)
    assert points.of("val_acc") == {1: pytest.approx(1 / 2)}


# --- batch sizes ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: [x, torch.ones(7)],
        lambda x: {"text": "a", "x": x},
        lambda x: {"nested": {"x": (x, 3)}},
        lambda x: ["a"] * len(x),
    ],
)
def test_the_batch_size_is_found_in_any_usual_batch(wrap: Any) -> None:
    class Weighs(Sums):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("x", float(batch_idx))

    batches = [wrap(torch.zeros(3)), wrap(torch.zeros(1))]
    (results,) = tiny_trainer().validate(Weighs(), batches, verbose=False)
    assert results == {"x": 0.25}


# --- several ranks --------------------------------------------------------------------------------------------------
class DifferentNames(Sums):
    """What each rank logs, and when, is told by its rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rank = self.global_rank
        self.log("all", float(batch[0]), on_step=True, on_epoch=True)
        self.log(f"only_{rank}", 10.0 + rank, prog_bar=True)
        self.log("first", 5.0, rank_zero_only=True, on_epoch=True)
        if rank == 1 and batch_idx == 1:
            self.log("once", 3.0, reduce_fx="sum", on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", batch.float().mean(), on_step=True, on_epoch=True)
        self.log(f"val_of_batch_{batch_idx}", float(batch_idx), prog_bar=True, logger=False)


def metrics_of_a_fit() -> Any:
    points, reads = Points(), Reads("on_train_batch_end", "on_validation_end", "on_train_epoch_end")
    module = DifferentNames()
    trainer = tiny_trainer(strategy="ddp", callbacks=[points, reads], log_every_n_steps=2, num_sanity_val_steps=1)
    trainer.fit(module, numbers(12), numbers(3))
    return points.points, reads.seen, trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics


def test_ranks_may_log_different_names_and_all_get_the_same_values() -> None:
    results = run_ranks(metrics_of_a_fit, 2)
    points = results[0][0]
    assert points == results[1][0]
    steps = {step: metrics for step, metrics in points if "all_step" in metrics}
    assert steps[1] == {"all_step": 1.0, "only_0": 10.0, "only_1": 11.0, "first_step": 5.0}
    assert steps[2]["all_step"] == 5.0
    at_end = dict(points[-1][1])
    assert at_end["all_epoch"] == pytest.approx(5.0)
    assert at_end["once"] == 3.0
    assert at_end["first_epoch"] == 5.0
    for view in (2, 3, 4):
        torch.testing.assert_close(results[0][view], results[1][view])
    assert results[0][2]["val"] == results[0][2]["val_epoch"] == pytest.approx(1.0)
    assert set(results[0][4]) == {"only_0", "only_1", "val_of_batch_0", "val_of_batch_1"}
    assert "val_of_batch_1" not in results[0][3]


def test_between_boundaries_a_step_metric_is_this_ranks_newest_value() -> None:
    results = run_ranks(metrics_of_a_fit, 2)
    for rank, result in enumerate(results):
        mine = [metrics["all_step"] for hook, metrics in result[1] if hook == "on_train_batch_end"]
        assert mine == [rank * 2.0, 4 + rank * 2.0, 8 + rank * 2.0]


class LogsUnevenly(Sums):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mean", batch.float().mean(), on_step=True, on_epoch=True)
        self.log("sum", batch.float().sum(), reduce_fx="sum", prog_bar=True)


def validate_one_batch() -> Any:
    trainer = tiny_trainer(strategy="ddp")
    results = trainer.validate(LogsUnevenly(), numbers(3, batch_size=4), verbose=False)
    return results, trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics


def test_a_rank_without_a_batch_knows_the_metrics_of_the_others() -> None:
    first, second, third = run_ranks(validate_one_batch, 3)
    assert first[0] == [{"mean_epoch": 1.0, "sum": 3.0}]
    assert first[1]["mean"] == 1.0
    assert first == second == third


class UnevenObjects(pl.Module):
    """One metric with sums, two that keep all samples, and a collection whose metrics share their states."""

    def __init__(self) -> None:
        super().__init__()
        kinds = torchmetrics.classification
        self.mean = torchmetrics.MeanMetric()
        self.auroc = kinds.MulticlassAUROC(num_classes=3)
        self.ranking = torchmetrics.retrieval.RetrievalMRR()  # lists that torchmetrics does not join before its sync
        self.pair = torchmetrics.MetricCollection({"ap": kinds.BinaryAveragePrecision(), "roc": kinds.BinaryAUROC()})
        self.elsewhere = [torchmetrics.MeanMetric()]
        self.log_elsewhere = False

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        scores = (batch.float() * 0.37) % 1.0
        self.mean.update(batch.float())
        self.auroc.update(torch.stack([scores, 1 - scores, scores * scores], dim=1), batch % 3)
        self.ranking.update(scores, batch % 2, indexes=batch // 3)
        self.pair.update(scores, batch % 2)
        self.log_dict({"mean": self.mean, "auroc": self.auroc, "ranking": self.ranking})
        self.log_dict(self.pair)
        if self.log_elsewhere:
            self.elsewhere[0].update(batch)
            self.log("elsewhere", self.elsewhere[0])


def validate_objects(*counts: int, strategy: str = "ddp") -> Any:
    module, trainer = UnevenObjects(), tiny_trainer(strategy=strategy)
    results = [trainer.validate(module, numbers(count), verbose=False)[0] for count in counts]
    assert module.mean._to_sync
    assert not module.mean._update_called
    return results


@pytest.mark.filterwarnings("ignore:No negative samples|No positive samples")
@pytest.mark.parametrize("ranks", [2, 3])
def test_metric_objects_are_those_of_one_process_whatever_each_rank_has_seen(ranks: int) -> None:
    counts = (2, 7, 5, 13)  # 1, 4, 3 and 7 batches
    alone = validate_objects(*counts, strategy="single")
    for results in run_ranks(validate_objects, ranks, *counts):
        assert results == [pytest.approx(result, abs=1e-6) for result in alone]


def validate_object_elsewhere(count: int) -> Any:
    module = UnevenObjects()
    module.log_elsewhere = True
    return tiny_trainer(strategy="ddp").validate(module, numbers(count), verbose=False)[0]["elsewhere"]


def test_a_metric_object_that_a_rank_cannot_find_is_an_error_on_all_ranks() -> None:
    assert run_ranks(validate_object_elsewhere, 2, 4) == [1.5, 1.5]
    with pytest.raises(RanksFailed) as failed:
        run_ranks(validate_object_elsewhere, 2, 2)
    for rank in range(2):
        assert "on 1 of 2 ranks" in failed.value.errors[rank].message
        assert "Make it an attribute of the module" in failed.value.errors[rank].message


class Monitors(pl.Callback):
    """Has `x` reduced after update 3 of 5, where no boundary is, and at the end of each validation."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            self.seen.append(("batch", float(trainer.reduced_metrics()["x"])))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(("validation", float(trainer.reduced_metrics()["x"])))


class LogsAndValidates(Logs):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", 1.0)


def reduced_in_between() -> Any:
    monitors, points = Monitors(), Points()
    trainer = tiny_trainer(strategy="ddp", callbacks=[monitors, points], val_check_interval=2, num_sanity_val_steps=0)
    trainer.fit(LogsAndValidates(), numbers(20), numbers(2))
    return monitors.seen, points.of("x")


def test_reduced_metrics_are_global_at_any_agreed_step() -> None:
    results = run_ranks(reduced_in_between, 2)
    for seen, points in results:
        assert seen == [("validation", 5.0), ("batch", 9.0), ("validation", 13.0)]
        assert points == {1: 1.0, 5: 17.0}  # the loggers hear of them at the boundaries alone


def test_several_loaders_of_a_dataset_of_tensors_keep_their_weights() -> None:
    data = DataLoader(TensorDataset(torch.arange(5.0)), batch_size=4)

    class Means(Sums):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            self.log("mean", batch[0].mean())

    results = tiny_trainer().test(Means(), {"left": data, "right": data}, verbose=False)
    assert results == [{"mean/dataloader_idx_0": 2.0}, {"mean/dataloader_idx_1": 2.0}]
