"""What `configure_optimizers` may return, and when schedulers step."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CyclicLR,
    ExponentialLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from paceline.errors import ConfigurationError
from paceline.trainer.module import Module
from paceline.trainer.optim import NullOptimizer, SchedulerConfig, estimated_stepping_batches, parse_optimizers
from paceline.trainer.optimizer_handle import OptimizerHandle
from paceline.trainer.schedules import Schedulers
from paceline.trainer.state import Progress


def optimizer(kind=SGD, lr=0.1):
    return kind(nn.Linear(2, 1).parameters(), lr=lr)


def parsed(returned, automatic=True):
    """`parse_optimizers`, having warned of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return parse_optimizers(returned, automatic)


class Custom:
    """A scheduler with nothing of torch's."""

    def __init__(self, of=None):
        self.optimizer = of
        self.calls = []

    def step(self, epoch=None):
        self.calls.append(epoch)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Measuring(Custom):
    def step(self, metrics):
        self.calls.append(metrics)


# --- the six forms -----------------------------------------------------------------------------------------------
def test_one_optimizer():
    opt = optimizer()
    assert parsed(opt) == ([opt], [])


@pytest.mark.parametrize("collection", [list, tuple])
def test_a_list_or_tuple_of_optimizers(collection):
    a, b = optimizer(), optimizer(Adam)
    assert parsed(collection([a])) == ([a], [])
    assert parsed(collection([a, b]), automatic=False) == ([a, b], [])


def test_two_lists_of_optimizers_and_schedulers():
    opt = optimizer()
    one, two = StepLR(opt, 1), ExponentialLR(opt, 0.9)
    assert parsed(([opt], [one, {"scheduler": two, "interval": "step", "frequency": 3, "name": "decay"}])) == (
        [opt],
        [SchedulerConfig(one), SchedulerConfig(two, name="decay", interval="step", frequency=3)],
    )
    assert parsed([[opt], [one]]) == ([opt], [SchedulerConfig(one)])
    assert parsed(([opt], one)) == ([opt], [SchedulerConfig(one)])
    assert parsed(([opt], {"scheduler": one})) == ([opt], [SchedulerConfig(one)])
    assert parsed(([opt], [])) == ([opt], [])


def test_a_dict_with_a_scheduler_or_a_scheduler_dict():
    opt = optimizer()
    scheduler = StepLR(opt, 1)
    assert parsed({"optimizer": opt}) == ([opt], [])
    assert parsed({"optimizer": opt, "lr_scheduler": None}) == ([opt], [])
    assert parsed({"optimizer": opt, "lr_scheduler": scheduler}) == ([opt], [SchedulerConfig(scheduler)])
    assert parsed({"optimizer": opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}) == (
        [opt],
        [SchedulerConfig(scheduler, interval="step")],
    )


@pytest.mark.parametrize("collection", [list, tuple])
def test_a_list_or_tuple_of_dicts(collection):
    a, b = optimizer(), optimizer(Adam)
    scheduler = StepLR(b, 1)
    assert parsed(collection([{"optimizer": a}]), automatic=True) == ([a], [])
    assert parsed(
        collection([{"optimizer": a}, {"optimizer": b, "lr_scheduler": {"scheduler": scheduler}}]), automatic=False
    ) == ([a, b], [SchedulerConfig(scheduler)])


@pytest.mark.parametrize("nothing", [None, [], (), ([], [])])
def test_none_gives_an_optimizer_that_does_nothing_and_a_warning(nothing):
    with pytest.warns(UserWarning, match="returned no optimizer") as told:
        (null,), schedulers = parse_optimizers(nothing)
    assert len(told) == 1
    assert isinstance(null, NullOptimizer)
    assert schedulers == []


def test_the_optimizer_that_does_nothing_calls_its_closure_and_has_an_empty_state():
    null = NullOptimizer()
    null.zero_grad()
    assert null.step() is None
    assert null.step(lambda: 3) == 3
    assert null.state_dict() == {"state": {}, "param_groups": []}


def test_a_handle_that_is_returned_counts_as_its_optimizer():
    opt = optimizer()
    scheduler = StepLR(opt, 1)
    optimizers, _ = parsed(([OptimizerHandle(opt, lambda *_: True)], [scheduler]))
    assert optimizers[0] is opt


# --- what is refused ---------------------------------------------------------------------------------------------
def test_several_optimizers_need_manual_optimization():
    with pytest.raises(ConfigurationError, match=r"self\.automatic_optimization = False"):
        parse_optimizers([optimizer(), optimizer()])


def unknown_forms():
    opt = optimizer()
    return [
        5,
        "adam",
        [1],
        (opt, StepLR(opt, 1)),
        (opt, [StepLR(opt, 1)]),
        [opt, {"optimizer": opt}],
        ([opt, 1], []),
        (o for o in [opt]),
        SGD,
    ]


@pytest.mark.parametrize("returned", unknown_forms(), ids=lambda form: type(form).__name__)
def test_another_form_is_refused_with_the_list_of_forms(returned):
    with pytest.raises(ConfigurationError, match=r'(?s)configure_optimizers returned a.*a dict with "optimizer"'):
        parse_optimizers(returned)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"intervall": "step"}, "'intervall'.*Did you mean 'interval'"),
        ({"freq": 1}, "'freq'.*Did you mean 'frequency'"),
        ({"zzz": 1}, "'zzz'.*The keys are: scheduler, name, interval"),
        ({"interval": "batch"}, "interval of the scheduler StepLR is 'batch'"),
        ({"interval": None}, "interval of the scheduler StepLR is None"),
        ({"frequency": 0}, "frequency of the scheduler StepLR is 0"),
        ({"frequency": 1.5}, "frequency of the scheduler StepLR is 1.5"),
        ({"frequency": True}, "frequency of the scheduler StepLR is True"),
        ({"reduce_on_plateau": True}, "StepLR needs the name of a logged metric"),
    ],
)
def test_a_wrong_key_of_a_scheduler_dict_is_refused(wrong, told):
    opt = optimizer()
    with pytest.raises(ConfigurationError, match=told):
        parse_optimizers({"optimizer": opt, "lr_scheduler": {"scheduler": StepLR(opt, 1), **wrong}})


def test_a_scheduler_dict_without_a_scheduler_is_refused():
    with pytest.raises(ConfigurationError, match='has no "scheduler"'):
        parse_optimizers({"optimizer": optimizer(), "lr_scheduler": {"interval": "step"}})


def test_a_wrong_key_beside_optimizer_is_refused():
    opt = optimizer()
    with pytest.raises(ConfigurationError, match=r"'lr_schedulers'.*Did you mean"):
        parse_optimizers({"optimizer": opt, "lr_schedulers": StepLR(opt, 1)})
    with pytest.raises(ConfigurationError, match=r"None as \"optimizer\""):
        parse_optimizers({"lr_scheduler": StepLR(opt, 1)})


def test_optimizers_that_take_turns_are_refused_with_the_way_to_write_it_now():
    dicts = ({"optimizer": optimizer(), "frequency": 1}, {"optimizer": optimizer(), "frequency": 5})
    with pytest.raises(ConfigurationError, match=r'"frequency" beside "optimizer".*automatic_optimization = False'):
        parse_optimizers(dicts, automatic=False)


@pytest.mark.parametrize("automatic", [True, False])
def test_a_scheduler_of_another_optimizer_is_refused(automatic):
    with pytest.raises(ConfigurationError, match="scheduler StepLR of an optimizer that it did not return"):
        parse_optimizers(([optimizer()], [StepLR(optimizer(), 1)]), automatic)


def test_what_has_no_step_is_no_scheduler():
    for thing in (object(), 5, optimizer):
        with pytest.raises(ConfigurationError, match=r"has no step\(\)"):
            parse_optimizers(([optimizer()], [thing]))


# --- monitors ----------------------------------------------------------------------------------------------------
def test_reduce_lr_on_plateau_needs_a_monitor():
    opt = optimizer()
    plateau = ReduceLROnPlateau(opt)
    for returned in (
        ([opt], [plateau]),
        ([opt], [{"scheduler": plateau}]),
        {"optimizer": opt, "lr_scheduler": plateau},
        {"optimizer": opt, "lr_scheduler": {"scheduler": plateau}},
    ):
        with pytest.raises(ConfigurationError, match="ReduceLROnPlateau needs the name of a logged metric"):
            parse_optimizers(returned)


def test_the_monitor_of_a_plateau_may_stand_in_either_dict():
    opt = optimizer()
    plateau = ReduceLROnPlateau(opt)
    expected = [SchedulerConfig(plateau, monitor="loss", reduce_on_plateau=True)]
    assert parsed({"optimizer": opt, "lr_scheduler": plateau, "monitor": "loss"})[1] == expected
    assert parsed({"optimizer": opt, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}})[1] == expected
    assert parsed({"optimizer": opt, "lr_scheduler": {"scheduler": plateau}, "monitor": "loss"})[1] == expected


def test_a_monitor_beside_another_scheduler_changes_nothing():
    opt = optimizer()
    scheduler = StepLR(opt, 1)
    assert parsed({"optimizer": opt, "lr_scheduler": scheduler, "monitor": "loss"})[1] == [SchedulerConfig(scheduler)]


def test_only_schedulers_whose_step_takes_a_metric_get_it():
    class Torchs(LRScheduler):
        def step(self, metrics=None):
            pass

        def get_lr(self):
            return [0.1]

    def gets_metric(scheduler):
        opt = optimizer()
        _, (config,) = parsed(([opt], [{"scheduler": scheduler(opt), "monitor": "loss"}]))
        return config.reduce_on_plateau

    assert gets_metric(Measuring)
    assert gets_metric(Torchs)
    assert not gets_metric(Custom)
    assert not gets_metric(lambda opt: StepLR(opt, 1))
    assert not gets_metric(lambda opt: SequentialLR(opt, [StepLR(opt, 1), StepLR(opt, 1)], [1]))
    assert not gets_metric(lambda opt: ChainedScheduler([StepLR(opt, 1)], opt))


def test_manual_optimization_needs_no_monitor_and_tells_which_keys_it_ignores():
    opt = optimizer()
    plateau = ReduceLROnPlateau(opt)
    assert parsed(([opt], [plateau]), automatic=False)[1][0].scheduler is plateau
    with pytest.warns(RuntimeWarning, match=r"\['monitor', 'strict'\], which manual optimization ignores"):
        parse_optimizers(([opt], [{"scheduler": plateau, "strict": False, "monitor": "loss"}]), automatic=False)


@pytest.mark.parametrize("cycle", [lambda o: OneCycleLR(o, 0.1, total_steps=9), lambda o: CyclicLR(o, 0.01, 0.1)])
def test_a_cycle_that_steps_once_an_epoch_is_warned_about(cycle):
    opt = optimizer()
    scheduler = cycle(opt)
    with pytest.warns(RuntimeWarning, match="once an epoch"):
        parse_optimizers(([opt], [scheduler]))
    parsed(([opt], [{"scheduler": scheduler, "interval": "step"}]))
    parsed(([opt], [scheduler]), automatic=False)


def test_a_custom_scheduler_is_taken_and_told_when_it_cannot_be_saved():
    class Stateless:
        def step(self):
            pass

    opt = optimizer()
    assert parsed(([opt], [Custom(opt)]))[1][0].interval == "epoch"
    with pytest.warns(UserWarning, match=r"Stateless has no state_dict\(\)"):
        parse_optimizers(([opt], [Stateless()]))


# --- when they step ----------------------------------------------------------------------------------------------
def stepped(configs, task="epoch_monitored", metrics=None, steps=0, epoch=0):
    """The (scheduler, metric) pairs that were stepped; real steps, too."""
    calls = []

    def step(scheduler, metric):
        calls.append((scheduler, metric))
        Module().lr_scheduler_step(scheduler, metric)

    schedulers = Schedulers(configs, step, lambda: metrics or {})
    schedulers.run(task, Progress(global_step=steps, epoch=epoch))
    return calls


def test_schedulers_are_due_by_interval_frequency_and_monitor():
    configs = [
        SchedulerConfig(Custom(), "step", interval="step"),
        SchedulerConfig(Custom(), "third", interval="step", frequency=3),
        SchedulerConfig(Custom(), "watch", interval="step", monitor="loss"),
        SchedulerConfig(Custom(), "epoch"),
        SchedulerConfig(Custom(), "other", frequency=2),
        SchedulerConfig(Custom(), "plateau", monitor="val"),
    ]
    names = {id(config.scheduler): config.name for config in configs}

    def due(*when):
        return [names[id(scheduler)] for scheduler, _ in stepped(configs, *when)]

    assert due("step", {}, 1) == ["step"]
    assert due("step", {}, 3) == ["step", "third"]
    assert due("step_monitored", {}, 3) == ["watch"]
    assert due("epoch", {}, 0, 0) == ["epoch"]
    assert due("epoch", {}, 0, 1) == ["epoch", "other"]
    assert due("epoch_monitored", {}, 0, 1) == ["plateau"]


def test_a_scheduler_without_a_metric_steps_plainly():
    opt = optimizer(lr=1.0)
    opt.step()
    config = SchedulerConfig(StepLR(opt, 1, gamma=0.5), monitor="not logged")
    assert stepped([config]) == [(config.scheduler, None)]
    assert opt.param_groups[0]["lr"] == 0.5


def test_a_plateau_gets_the_monitored_metric():
    opt = optimizer(lr=1.0)
    _, configs = parsed(([opt], [{"scheduler": ReduceLROnPlateau(opt, patience=0, factor=0.1), "monitor": "loss"}]))
    for _ in range(2):
        assert stepped(configs, metrics={"loss": torch.tensor(1.0), "other": torch.tensor(0.0)})
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1)


def test_custom_schedulers_step_with_a_metric_only_where_they_take_it():
    opt = optimizer()
    plain, measuring = Custom(opt), Measuring(opt)
    _, configs = parsed(([opt], [{"scheduler": s, "monitor": "loss"} for s in (plain, measuring)]))
    assert stepped(configs, metrics={"loss": 2.0}) == [(plain, None), (measuring, 2.0)]
    assert plain.calls == [None]
    assert measuring.calls == [2.0]


def test_a_missing_metric_is_an_error_that_lists_those_logged():
    config = SchedulerConfig(ReduceLROnPlateau(optimizer()), monitor="val_los", reduce_on_plateau=True)
    with pytest.raises(ConfigurationError, match=r"Logged are: loss, val_loss\. Did you mean 'val_loss'"):
        stepped([config], metrics={"loss": 1.0, "val_loss": 1.0})
    with pytest.raises(ConfigurationError, match="Logged are: none"):
        stepped([config])


def test_a_missing_metric_is_skipped_with_a_warning_when_not_strict():
    config = SchedulerConfig(Measuring(), monitor="val_loss", reduce_on_plateau=True, strict=False)
    with pytest.warns(RuntimeWarning, match="'val_loss', which is not logged"):
        assert stepped([config], metrics={"loss": 1.0}) == []


# --- how long a run is -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1, -1, 4, 1), 4),
        ((3, -1, 5, 2), 9),
        ((2, -1, 5, 10), 2),
        ((3, 100, 5, 2), 9),
        ((3, 4, 5, 2), 4),
        ((0, -1, 5, 1), 5),
        ((3, 0, 5, 1), 0),
        ((None, 7, 5, 1), 7),
        ((-1, 7, 5, 2), 7),
        ((-1, -1, 5, 2), math.inf),
        ((None, -1, 5, 2), math.inf),
        ((3, -1, math.inf, 1), -1),
        ((3, 7, math.inf, 1), 7),
        ((-1, 7, math.inf, 1), 7),
        ((-1, -1, math.inf, 1), math.inf),
    ],
)
def test_estimated_stepping_batches_are_lightnings(arguments, expected):
    estimate = estimated_stepping_batches(*arguments)
    assert estimate == expected
    assert isinstance(estimate, int) or math.isinf(estimate)
