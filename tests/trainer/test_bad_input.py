"""What users get wrong, and what they are told: each error before or at the first step, with what to do next.

The messages are the subject here. Hooks that are misspelt are in `test_hooks.py`, devices in `test_auto.py`, misuse of
`self.log` in `test_metrics.py`.
"""

from __future__ import annotations

import inspect
import re
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

import paceline as pl
from paceline import callbacks
from paceline.callbacks import EarlyStopping, ModelCheckpoint
from paceline.errors import ConfigurationError, LaunchError, PacelineError, UnknownArgumentError
from paceline.trainer.arguments import REMOVED_ARGUMENTS
from paceline.trainer.prefetch import move

from helpers.tiny import Numbers, Regression, Sums, loader, numbers, tiny_trainer


# --- when to stop ---------------------------------------------------------------------------------------------------
def test_fit_without_any_limit_is_refused_and_evaluation_is_not() -> None:
    trainer = tiny_trainer(max_epochs=None)
    with pytest.raises(
        ConfigurationError, match=r"fit\(\) would never end: give Trainer\(max_epochs=\.\.\.\), max_steps="
    ):
        trainer.fit(Regression(), loader(2))
    assert trainer.validate(Evaluates(), numbers(2), verbose=False) == [{}]


class Evaluates(Sums):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


# --- arguments of the Trainer ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_epoch", "max_epochs"), ("accumulate_grad_batch", "accumulate_grad_batches"),
        ("precison", "precision"), ("callback", "callbacks"), ("log_every_n_step", "log_every_n_steps"),
        ("gradient_clip_value", "gradient_clip_val"), ("loggers", "logger"), ("device", "devices"),
    ],
)  # fmt: skip
def test_a_misspelt_argument_names_the_nearest_right_one(wrong: str, right: str) -> None:
    with pytest.raises(
        UnknownArgumentError, match=rf"Trainer\({wrong}=1\): there is no argument '{wrong}'.*mean '{right}'"
    ):
        pl.Trainer(**{wrong: 1})


@pytest.mark.parametrize(
    ("make", "wrong", "message"),
    [
        (pl.Trainer, {"enable_checkpointing": "False"}, "expected True or False or None, got str"),
        (pl.Trainer, {"inference_mode": 2}, "expected True or False, got int"),
        (pl.Trainer, {"default_root_dir": 3}, "expected a path or None, got int"),
        (pl.Trainer, {"fast_dev_run": "yes"}, "is not a whole number of at least 0"),
        (EarlyStopping, {"monitor": 3}, "expected a text, got int"),
        (EarlyStopping, {"monitor": "loss", "patience": "3"}, "expected a whole number, got str"),
        (EarlyStopping, {"monitor": "loss", "patience": -1}, "is not a whole number of at least 0"),
        (EarlyStopping, {"monitor": "loss", "min_delta": "0.1"}, "expected a number, got str"),
        (EarlyStopping, {"monitor": "loss", "stopping_threshold": "1"}, "expected a number or None, got str"),
        (ModelCheckpoint, {"every_n_epochs": 1.5}, "expected a whole number or None, got float"),
        (ModelCheckpoint, {"train_time_interval": 60}, "expected a timedelta or None, got int"),
        (ModelCheckpoint, {"dirpath": 3}, "expected a path or None, got int"),
        (callbacks.BackboneFinetuning, {"unfreeze_backbone_at_epoch": -1}, "is not a whole number of at least 0"),
        (callbacks.GradientAccumulationScheduler, {"scheduling": "4"}, "give epochs and factors, as in {0: 8, 4: 4}"),
    ],
)
def test_an_argument_of_another_type_is_refused_where_it_is_given(make: Any, wrong: Any, message: str) -> None:
    name, value = list(wrong.items())[-1]
    with pytest.raises(ConfigurationError, match=rf"{name}={re.escape(repr(value))}.*{re.escape(message)}"):
        make(**wrong)


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    stop = EarlyStopping("loss", min_delta=np.float32(0.5), patience=np.int64(2), stopping_threshold=torch.tensor(0.1))
    assert (stop.patience, stop.stopping_threshold) == (2, torch.tensor(0.1))
    assert ModelCheckpoint(verbose=np.bool_(True)).verbose
    numbers = {"max_epochs": np.int64(3), "limit_train_batches": np.int64(4), "gradient_clip_val": torch.tensor(0.5)}
    trainer = tiny_trainer(**numbers, devices=np.int64(1), val_check_interval=np.float32(0.25))
    assert (trainer.max_epochs, trainer.limit_train_batches, trainer.gradient_clip_val) == (3, 4, 0.5)
    assert type(trainer.limit_train_batches) is int and trainer.val_check_interval == 0.25
    with pytest.raises(ConfigurationError, match=r"patience=.*1\.5.* is not a whole number"):
        EarlyStopping("loss", patience=torch.tensor(1.5))


@pytest.mark.parametrize("name", REMOVED_ARGUMENTS)
def test_an_argument_that_lightning_removed_says_what_to_write_now(name: str) -> None:
    with pytest.raises(UnknownArgumentError, match=rf"Trainer\({name}=3\) is not an argument \(any more\). Write "):
        pl.Trainer(**{name: 3})


def test_an_unknown_argument_is_also_a_type_error_and_all_errors_of_ours_have_one_base() -> None:
    assert issubclass(UnknownArgumentError, TypeError)
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(UnknownArgumentError, PacelineError)


def test_arguments_by_position_are_refused() -> None:
    with pytest.raises(TypeError, match="positional"):
        pl.Trainer("ddp")  # type: ignore[misc]


def test_the_signature_shows_names_only_and_what_holds_by_default() -> None:
    parameters = inspect.signature(pl.Trainer).parameters
    assert {one.kind for one in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    names = "num_sanity_val_steps val_check_interval accumulate_grad_batches gradient_clip_algorithm log_every_n_steps"
    trainer = pl.Trainer(accelerator="cpu")
    assert all(getattr(trainer, name) == parameters[name].default is not None for name in names.split())


def test_what_is_asked_for_beside_barebones_is_refused_even_where_it_is_the_default() -> None:
    assert pl.Trainer(barebones=True, max_epochs=1, accelerator="cpu").callbacks == []
    with pytest.raises(ConfigurationError, match="switches enable_progress_bar off"):
        pl.Trainer(barebones=True, enable_progress_bar=True)


def test_errors_are_those_that_python_has_for_them(tmp_path: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a subclass of paceline\.Module"):
        tiny_trainer().fit(torch.nn.Linear(1, 1), loader(2))  # type: ignore[arg-type]
    for data in ((3,), (numbers(2), 3)):
        with pytest.raises(TypeError, match="cannot be iterated"):
            tiny_trainer().fit(Evaluates(), *data)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        tiny_trainer().validate(Evaluates(), numbers(2), ckpt_path=tmp_path / "none.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "horovod"}, r"strategy='horovod' is not known. Did you mean '.*'\? There are 'auto', "),
        ({"precision": "fp8"}, r"precision='fp8' is not known. Use one of '32-true', 'bf16-mixed', '16-mixed'"),
        ({"accelerator": "quantum"}, r"accelerator='quantum' is not known. Did you mean "),
        ({"devices": 0}, r"devices=0 is too few. Use a number of at least 1, -1 or 'auto'"),
        ({"max_epochs": 1.5}, r"max_epochs=1.5 is not a whole number of at least 0 or -1"),
        ({"max_epochs": "ten"}, r"max_epochs='ten' is not a whole number"),
        ({"max_epochs": -2}, r"max_epochs=-2 is not a whole number of at least 0 or -1"),
        ({"max_steps": -5}, r"max_steps=-5 is not a whole number of at least 0 or -1"),
        ({"min_epochs": -1}, r"min_epochs=-1 is not a whole number of at least 0"),
        ({"max_time": "1:30"}, r"max_time='1:30' is not of the form 'DD:HH:MM:SS', as '00:01:30:00' for 90 minutes"),
        ({"max_time": {"hour": 1}}, r"max_time=\{'hour': 1\}: use keys days, hours, minutes, seconds"),
        ({"max_time": 90}, r"max_time=90: use 'DD:HH:MM:SS', a timedelta or a dict"),
        ({"limit_train_batches": 1.5}, r"limit_train_batches=1.5 is neither a number of batches \(an int from 0\) nor"),
        ({"limit_val_batches": -1}, r"limit_val_batches=-1 is neither"),
        ({"limit_test_batches": True}, r"limit_test_batches=True is neither"),
        ({"limit_predict_batches": "all"}, r"limit_predict_batches='all' is neither"),
        ({"overfit_batches": 2.5}, r"overfit_batches=2.5 is neither"),
        ({"fast_dev_run": -1}, r"fast_dev_run=-1 is not a whole number of at least 0"),
        ({"num_sanity_val_steps": -2}, r"num_sanity_val_steps=-2 is not a whole number of at least 0 or -1"),
        ({"val_check_interval": 0}, r"val_check_interval=0 is neither"),
        ({"val_check_interval": 1.5}, r"val_check_interval=1.5 is neither"),
        ({"check_val_every_n_epoch": 0}, r"check_val_every_n_epoch=0 is not a whole number of at least 1"),
        ({"check_val_every_n_epoch": None, "val_check_interval": 0.5}, r"=None counts .* val_check_interval=0.5 must"),
        ({"accumulate_grad_batches": 0}, r"accumulate_grad_batches=0 is not a whole number of at least 1"),
        ({"accumulate_grad_batches": {0: 2}}, r"is no number. Write callbacks=\[GradientAccumulationScheduler"),
        ({"global_batch_size": 0}, r"global_batch_size=0 is not a whole number of at least 1"),
        (
            {"global_batch_size": 8, "accumulate_grad_batches": 2},
            r"accumulate_grad_batches=2 and global_batch_size=8 contradict each other.*Give one of them",
        ),
        ({"gradient_clip_val": -1.0}, r"gradient_clip_val=-1.0 is not a number of at least 0"),
        ({"gradient_clip_val": "norm"}, r"gradient_clip_val='norm' is not a number"),
        ({"gradient_clip_algorithm": "l1"}, r"gradient_clip_algorithm='l1' is not known. Use 'norm' or 'value'"),
        ({"log_every_n_steps": -1}, r"log_every_n_steps=-1 is not a whole number of at least 0"),
        ({"callbacks": [print]}, r"callbacks holds <built-in function print>.*expected objects of"),
        ({"callbacks": pl.Callback}, r"callbacks holds <class .*expected objects of subclasses of paceline.Callback"),
        ({"callbacks": [pl.Callback]}, r"callbacks holds <class .*expected objects"),
        ({"logger": "tensorboard"}, r"logger='tensorboard' is a str, expected True, False, or loggers"),
        ({"callbacks": ModelCheckpoint(), "enable_checkpointing": False}, r"enable_checkpointing=False, but"),
        ({"barebones": True, "logger": True}, r"barebones=True switches logger off, but logger=True asks for it"),
        ({"barebones": True, "log_every_n_steps": 5}, r"barebones=True switches log_every_n_steps off"),
    ],
)  # fmt: skip
def test_an_argument_that_cannot_be_meant_is_refused_when_the_trainer_is_built(
    arguments: dict[str, Any], message: str
) -> None:
    given = {"accelerator": "cpu", "max_epochs": 1, **arguments}
    with pytest.raises(ConfigurationError, match=message):
        pl.Trainer(**given)


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        ({"max_epochs": 3.0}, "max_epochs", 3),
        ({"max_steps": 100.0}, "max_steps", 100),
        ({"limit_train_batches": 0.5}, "limit_train_batches", 0.5),
        ({}, "limit_val_batches", 1.0),
        ({"fast_dev_run": 3}, "fast_dev_run", 3),
        ({"fast_dev_run": False}, "fast_dev_run", False),
        ({"gradient_clip_val": 0}, "gradient_clip_val", None),
        ({"num_sanity_val_steps": -1}, "num_sanity_val_steps", float("inf")),
    ],
)
def test_other_spellings_of_a_value_are_understood(arguments: dict[str, Any], name: str, expected: Any) -> None:
    assert getattr(tiny_trainer(**arguments), name) == expected


@pytest.mark.parametrize(
    "max_time",
    ["00:00:01:30", timedelta(seconds=90), {"minutes": 1, "seconds": 30}],
)
def test_the_spellings_of_max_time(max_time: Any) -> None:
    assert tiny_trainer(max_time=max_time).arguments.max_seconds == 90


def test_two_callbacks_of_one_kind_whose_states_cannot_be_told_apart_are_refused() -> None:
    class Counts(pl.Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"count": 1}

    with pytest.raises(ConfigurationError, match=r"Two callbacks have the state_key '.*Counts'.*Override state_key"):
        tiny_trainer(callbacks=[Counts(), Counts()])


# --- what fit is given ----------------------------------------------------------------------------------------------
def test_a_plain_torch_module_is_told_what_to_derive_from() -> None:
    with pytest.raises(
        ConfigurationError, match=r"got a torch.nn.modules.linear.Linear, expected a subclass of paceline.Mod"
    ):
        tiny_trainer().fit(torch.nn.Linear(1, 1), loader(2))


def test_a_class_instead_of_an_object_is_told_so() -> None:
    with pytest.raises(ConfigurationError, match=r"Trainer got a .*type, expected a subclass of paceline.Module"):
        tiny_trainer().fit(Regression, loader(2))


def test_a_module_without_training_step_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Module has no training_step, so fit\(\) cannot train it. Define "):
        tiny_trainer().fit(pl.Module(), loader(2))


def test_fit_without_data_says_where_it_may_come_from() -> None:
    with pytest.raises(
        ConfigurationError, match=r"There is no train data: pass a loader to fit\(\), or define train_dataload"
    ):
        tiny_trainer().fit(Regression())


def test_loaders_and_a_data_module_at_once_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Both loaders and a data module were given. Pass one of them"):
        tiny_trainer().fit(Regression(), loader(2), datamodule=pl.DataModule())
    with pytest.raises(ConfigurationError, match="Two data modules were given"):
        tiny_trainer().fit(Regression(), pl.DataModule(), datamodule=pl.DataModule())


def test_a_loader_that_cannot_be_iterated_is_named() -> None:
    with pytest.raises(
        ConfigurationError, match=r"The training loader is a int, which cannot be iterated. Pass a DataL"
    ):
        tiny_trainer().fit(Regression(), 3)


@pytest.mark.parametrize("call", ["fit", "validate"])
def test_a_loader_whose_sampler_has_no_length_is_told_where_one_is_missing(call: str) -> None:
    class Endless(Sampler[int]):
        def __iter__(self) -> Any:
            while True:
                yield 0

    with pytest.raises(ConfigurationError, match=r"The loader has no length: its sampler \(Endless\) has no __len__"):
        getattr(tiny_trainer(), call)(Evaluates(), DataLoader(Numbers(4), sampler=Endless()))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(4))


def test_a_fraction_of_a_loader_without_length_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"limit_train_batches=0.5 is a fraction, but the loader has no length. Use"
    ):
        tiny_trainer(limit_train_batches=0.5).fit(Sums(), DataLoader(Stream()))


def test_a_fraction_of_less_than_one_batch_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"limit_train_batches=0.1 of 4 batches is less than one. Use at least 0.25"
    ):
        tiny_trainer(limit_train_batches=0.1).fit(Sums(), numbers(8))


def test_a_global_batch_of_a_stream_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"global_batch_size needs a map-style DataLoader.*accumulate_grad_batches"
    ):
        tiny_trainer(global_batch_size=4).fit(Sums(), DataLoader(Stream()))


# --- what training_step returns -------------------------------------------------------------------------------------
def returning(make: Any) -> pl.Module:
    class Returns(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return make(self, batch)

    return Returns()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda self, batch: 0.5,
            r"training_step returned 0.5 \(float\). Return the loss as a scalar tensor, a dict whose",
        ),
        (
            lambda self, batch: {"los": self.loss(batch)},
            r"returned a dict with keys \['los'\] \(dict\). Return the loss",
        ),
        (lambda self, batch: {"loss": 0.5}, r"training_step returned a dict with keys \['loss'\]"),
        (lambda self, batch: (self.loss(batch), 1), r"training_step returned \(tensor.* \(tuple\). Return the loss"),
        (lambda self, batch: self(batch[0]), r"returned a loss of shape \(2,\). Return one number: loss.mean\(\) or"),
        (
            lambda self, batch: self.loss(batch).detach(),
            r"a loss that has no gradient \(requires_grad is False\). Compute it",
        ),
        (
            lambda self, batch: torch.tensor(0.5),
            r"without detach\(\), .item\(\) or no_grad\(\), and check that not all",
        ),
        (lambda self, batch: {"loss": self.loss(batch).detach()}, r"a loss that has no gradient"),
    ],
)
def test_a_loss_that_no_backward_pass_can_start_from_is_refused_at_the_first_step(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tiny_trainer().fit(returning(make), loader(4))


def test_a_frozen_module_is_told_that_its_loss_has_no_gradient() -> None:
    module = Regression()
    module.freeze()
    with pytest.raises(ConfigurationError, match="check that not all parameters are frozen"):
        tiny_trainer().fit(module, loader(4))


# --- batches --------------------------------------------------------------------------------------------------------
class Stubborn:
    """A batch that says how to move it, and cannot."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def to(self, device: torch.device) -> Any:
        raise self.error


@pytest.mark.parametrize("error", [TypeError("unexpected"), RuntimeError("no"), AttributeError("x")])
def test_a_batch_that_cannot_be_moved_names_its_type_and_the_hook_to_override(error: Exception) -> None:
    with pytest.raises(
        ConfigurationError, match=r"A Stubborn in the batch could not be moved.*Override transfer_batch_to_"
    ):
        tiny_trainer(precision="64-true").fit(Regression(), [Stubborn(error)])
    with pytest.raises(ConfigurationError, match=r"its to\('cpu'\) failed with"):
        move({"x": [Stubborn(error)]}, torch.device("cpu"))


# --- metrics that nobody logs ---------------------------------------------------------------------------------------
class LogsLoss(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss


@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
def test_monitoring_a_metric_that_was_never_logged_lists_those_that_were(kind: Any, tmp_path: Any) -> None:
    callback = kind(monitor="val_loss") if kind is EarlyStopping else kind(dirpath=tmp_path, monitor="val_loss")
    with pytest.raises(
        ConfigurationError, match=rf"{kind.__name__}\(monitor='val_loss'\).*never logged. Logged were: 'train_loss'"
    ):
        tiny_trainer(callbacks=callback, enable_checkpointing=True, max_epochs=3).fit(LogsLoss(), loader(4))


# --- launching ------------------------------------------------------------------------------------------------------
def test_a_launch_from_where_none_is_possible_names_torchrun_and_devices_1() -> None:
    trainer = tiny_trainer(devices=2)
    message = (
        r"devices=2 needs 2 processes, and they cannot be started from here: pytest is running.*"
        r"torchrun --nproc-per-node 2 script.py`, or use devices=1"
    )
    for call in (lambda: trainer.fit(Regression(), loader(4)), lambda: trainer.validate(Evaluates(), numbers(2))):
        with pytest.raises(LaunchError, match=message):
            call()


# --- manual optimization --------------------------------------------------------------------------------------------
class ByHand(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"gradient_clip_val": 1.0},
            r"gradient_clip_val=1.0 cannot be used with manual optimization.*in training_step",
        ),
        ({"global_batch_size": 8}, r"global_batch_size=8 cannot be used with manual optimization"),
        ({"accumulate_grad_batches": 2}, r"accumulate_grad_batches=2 cannot be used with manual.*Call manual_backward"),
    ],
)
def test_what_manual_optimization_does_itself_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tiny_trainer(**arguments).fit(ByHand(), loader(4))


@pytest.mark.parametrize("said", [None, -1.0, float("nan"), torch.ones(2)], ids=str)
@pytest.mark.parametrize("make", [loader, lambda count: list(loader(count))], ids=["map", "stream"])
def test_a_loss_weight_that_is_no_number_of_items_is_refused(make: Any, said: Any) -> None:
    class Weighs(Regression):
        def loss_weight(self, batch: Any) -> Any:
            return said

    with pytest.raises(ConfigurationError, match=r"loss_weight returned .* is 0 or more"):
        tiny_trainer().fit(Weighs(), make(4))


def test_a_loss_weight_under_manual_optimization_is_refused() -> None:
    class Weighs(ByHand):
        def loss_weight(self, batch: Any) -> float:
            return 1.0

    with pytest.raises(ConfigurationError, match="loss_weight cannot be used with manual optimization"):
        tiny_trainer().fit(Weighs(), loader(4))


def test_several_optimizers_under_automatic_optimization_are_refused() -> None:
    class Two(Regression):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]

    with pytest.raises(
        ConfigurationError, match=r"2 optimizers; automatic optimization takes one. Set .*automatic_optimiza"
    ):
        tiny_trainer().fit(Two(), loader(4))
