"""Hooks: the order of all of them in the four calls, written out in full; only overridden ones run; misspelt ones.

`recording` makes a class in which every hook notes itself as `who.hook` and does what its base class does.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import paceline as pl
from paceline.errors import ConfigurationError
from paceline.trainer.hooks import REMOVED_HOOKS, SHARED_HOOKS, Hooks

from helpers.ranks import run_ranks
from helpers.tiny import Regression, Sums, loader, numbers, tiny_trainer

STAGES = ("validation", "test", "predict")
MOMENTS = ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end")
TRAINING = (
    "on_fit_start on_fit_end on_train_start on_train_end on_train_epoch_start on_train_epoch_end on_train_batch_start "
    "on_train_batch_end on_before_zero_grad on_before_backward on_after_backward on_before_optimizer_step"
)
CHECKPOINTS = "on_save_checkpoint on_load_checkpoint"
TRANSFER = "on_before_batch_transfer transfer_batch_to_device on_after_batch_transfer"
SHARED = [*TRAINING.split(), *(f"on_{stage}_{moment}" for stage in STAGES for moment in MOMENTS), *CHECKPOINTS.split()]
CALLBACK_ONLY = "setup teardown on_sanity_check_start on_sanity_check_end on_exception state_dict load_state_dict"
MODULE_ONLY = (
    f"{TRANSFER} setup teardown prepare_data configure_model configure_optimizers configure_callbacks training_step "
    "validation_step test_step predict_step optimizer_zero_grad backward configure_gradient_clipping optimizer_step "
    "lr_scheduler_step"
)
DATA = f"{TRANSFER} setup teardown prepare_data train_dataloader val_dataloader state_dict load_state_dict on_exception"
MODES = ["on_validation_model_zero_grad"]
MODES += [f"on_{stage}_model_{mode}" for stage in STAGES for mode in ("eval", "train")]


def recording(who: str, base: type, hooks: list[str], calls: list[str]) -> Any:
    """An object of a subclass of `base` in which each of `hooks` notes its call."""

    def make(hook: str) -> Any:
        def record(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(f"{who}.{hook}")
            return getattr(super(kind, self), hook)(*args, **kwargs)

        return record

    kind = type(f"Recording{who}", (base,), {hook: make(hook) for hook in hooks})
    return kind()


class Model(Regression):
    """Every step there is, a scheduler by step and one by epoch."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.loss(batch)

    test_step = validation_step
    predict_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        by_step = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        by_epoch = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        return [optimizer], [{"scheduler": by_step, "interval": "step"}, {"scheduler": by_epoch, "interval": "epoch"}]


class Data(pl.DataModule):
    def train_dataloader(self) -> Any:
        return loader(6)

    def val_dataloader(self) -> Any:
        return loader(2)

    def state_dict(self) -> dict[str, Any]:
        return {"read": 3}


class WithState(pl.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"count": 1}


class ActsOnMetrics(pl.Callback):
    acts_on_metrics = True


def recorded(call: str, calls: list[str], ckpt_path: str | None = None, **arguments: Any) -> pl.Trainer:
    """Run one of the four calls with everything recorded into `calls`."""
    module = recording("LM", Model, [*SHARED, *MODULE_ONLY.split(), *MODES], calls)
    callback = recording("CB", WithState, [*SHARED, *CALLBACK_ONLY.split()], calls)
    acting = recording("ACTS", ActsOnMetrics, ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"], calls)
    trainer = tiny_trainer(callbacks=[acting, callback], num_sanity_val_steps=1, gradient_clip_val=1.0, **arguments)
    if call == "fit":
        trainer.fit(module, datamodule=recording("DM", Data, DATA.split(), calls), ckpt_path=ckpt_path)
    else:
        getattr(trainer, call)(module, loader(4))
    return trainer


def expand(text: str) -> list[str]:
    """The expected calls: `BOTH.hook` is CB, then LM; `VAL.` a validation batch; `TRANSFER` the hooks of a transfer."""
    found: list[str] = []
    for word in text.split():
        if word.startswith("BOTH."):
            found += [word.replace("BOTH", "CB"), word.replace("BOTH", "LM")]
        elif word == "TRANSFER":
            found += [f"DM.{hook}" for hook in TRANSFER.split()]
        else:
            found.append(word)
    return found


VALIDATION = """
{start}
LM.on_validation_model_eval
BOTH.on_validation_start
BOTH.on_validation_epoch_start
    TRANSFER
    BOTH.on_validation_batch_start
    LM.validation_step
    BOTH.on_validation_batch_end
BOTH.on_validation_epoch_end
{end}
LM.on_validation_model_train
"""
SET_UP = """
DM.prepare_data LM.prepare_data
DM.setup CB.setup LM.setup
LM.configure_model
"""
TEAR_DOWN = "DM.teardown CB.teardown LM.teardown"
ENDS = "ACTS.on_validation_end BOTH.on_validation_end"


def test_the_order_of_all_hooks_of_fit() -> None:
    calls: list[str] = []
    recorded("fit", calls, accumulate_grad_batches=2)
    first = """
        TRANSFER
        BOTH.on_train_batch_start
        LM.training_step
        BOTH.on_before_zero_grad
        LM.optimizer_zero_grad
        BOTH.on_before_backward
        LM.backward
        BOTH.on_after_backward
    """
    middle = (
        "TRANSFER BOTH.on_train_batch_start LM.training_step BOTH.on_before_backward LM.backward BOTH.on_after_backward"
    )
    step = """
        BOTH.on_before_optimizer_step
        LM.configure_gradient_clipping
        LM.optimizer_step
        LM.lr_scheduler_step
    """
    end = "BOTH.on_train_batch_end ACTS.on_train_batch_end"  # who saves or stops acts at the ends of windows
    expected = f"""
        {SET_UP}
        LM.configure_optimizers
        BOTH.on_fit_start
        CB.on_sanity_check_start
        {VALIDATION.format(start="", end=ENDS)}
        CB.on_sanity_check_end
        BOTH.on_train_start
        BOTH.on_train_epoch_start
        {first} BOTH.on_train_batch_end
        {middle} {step} {end}
        {first} {step} {end}
        LM.lr_scheduler_step
        {VALIDATION.format(start="LM.on_validation_model_zero_grad", end=ENDS)}
        BOTH.on_train_epoch_end
        ACTS.on_train_epoch_end
        BOTH.on_train_end
        BOTH.on_fit_end
        {TEAR_DOWN}
    """
    for asked_once in ("LM.configure_callbacks", "DM.train_dataloader", "DM.val_dataloader"):
        calls.remove(asked_once)  # its place is not promised
    assert calls == expand(expected)


@pytest.mark.parametrize(("call", "stage"), [("validate", "validation"), ("test", "test"), ("predict", "predict")])
def test_the_order_of_all_hooks_of_evaluation(call: str, stage: str) -> None:
    calls: list[str] = []
    recorded(call, calls)
    transfer = " ".join(f"LM.{hook}" for hook in TRANSFER.split())
    batch = f"""
        {transfer}
        BOTH.on_{stage}_batch_start
        LM.{stage}_step
        BOTH.on_{stage}_batch_end
    """
    end = f"BOTH.on_{stage}_end" if stage != "validation" else ENDS
    expected = f"""
        LM.prepare_data
        CB.setup LM.setup
        LM.configure_model
        LM.on_{stage}_model_eval
        BOTH.on_{stage}_start
        BOTH.on_{stage}_epoch_start
        {batch}
        {batch}
        BOTH.on_{stage}_epoch_end
        {end}
        LM.on_{stage}_model_train
        CB.teardown LM.teardown
    """
    calls.remove("LM.configure_callbacks")
    assert calls == expand(expected)


def test_the_order_of_hooks_when_a_checkpoint_is_saved_and_loaded() -> None:
    calls: list[str] = []
    trainer = recorded("fit", calls)
    calls.clear()
    path = trainer.save_checkpoint("saved.ckpt")
    assert set(calls) == {"CB.state_dict", "CB.on_save_checkpoint", "DM.state_dict", "LM.on_save_checkpoint"}
    assert calls[-1] == "LM.on_save_checkpoint"  # it may edit what all others gave
    calls.clear()
    recorded("fit", calls, ckpt_path=path, max_epochs=2)
    start, stop = calls.index("LM.configure_model") + 1, calls.index("CB.on_fit_start")
    loaders = ("DM.train_dataloader", "DM.val_dataloader")
    assert [name for name in calls[start:stop] if name not in loaders] == [
        "LM.on_load_checkpoint", "DM.load_state_dict", "CB.on_load_checkpoint", "CB.load_state_dict",
        "LM.configure_optimizers",
    ]  # fmt: skip
    assert stop < calls.index("CB.on_train_start")
    assert "CB.on_sanity_check_start" not in calls  # the run that goes on had its check


def test_an_exception_is_told_to_callbacks_then_to_the_data_module_and_all_is_torn_down() -> None:
    calls: list[str] = []

    class Fails(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("x")

    callback = recording("CB", pl.Callback, ["on_exception", "teardown", "on_train_end"], calls)
    module = recording("LM", Fails, ["teardown", "on_train_end"], calls)
    data = recording("DM", Data, ["on_exception", "teardown"], calls)
    with pytest.raises(KeyError):
        tiny_trainer(callbacks=callback).fit(module, datamodule=data)
    assert calls == ["CB.on_exception", "DM.on_exception", "DM.teardown", "CB.teardown", "LM.teardown"]


def test_two_callbacks_run_in_the_order_of_the_list() -> None:
    calls: list[str] = []
    callbacks = [recording(who, pl.Callback, ["on_train_start", "on_fit_end"], calls) for who in ("first", "second")]
    tiny_trainer(callbacks=callbacks).fit(Sums(), numbers(2))
    assert calls == ["first.on_train_start", "second.on_train_start", "first.on_fit_end", "second.on_fit_end"]


# --- what hooks are given -------------------------------------------------------------------------------------------
def test_callbacks_get_the_trainer_and_the_module_before_what_the_module_gets() -> None:
    class Checks(pl.Callback):
        seen: dict[str, tuple[Any, ...]]

        def __init__(self) -> None:
            self.seen = {}
            for hook in SHARED_HOOKS:
                setattr(self, hook, self.keeper(hook))

        def keeper(self, hook: str) -> Any:
            def keep(trainer: Any, pl_module: Any, *args: Any) -> None:
                assert isinstance(trainer, pl.Trainer)
                assert pl_module is trainer.lightning_module
                self.seen[hook] = args

            return keep

    checks, module = Checks(), Model()
    trainer = tiny_trainer(callbacks=checks)
    trainer.fit(module, loader(2), [loader(2), loader(2)])
    trainer.test(module, loader(2))
    trainer.predict(module, loader(2))
    assert set(checks.seen) == set(SHARED_HOOKS)
    counts = {hook: len(args) for hook, args in checks.seen.items() if args}
    assert counts == {
        "on_train_batch_start": 2, "on_train_batch_end": 3, "on_before_zero_grad": 1, "on_before_backward": 1,
        "on_before_optimizer_step": 1,
        **{f"on_{stage}_batch_start": 3 for stage in STAGES}, **{f"on_{stage}_batch_end": 4 for stage in STAGES},
    }  # fmt: skip
    assert checks.seen["on_before_optimizer_step"] == (trainer.optimizers[0],)
    assert checks.seen["on_validation_batch_start"][1:] == (0, 1)
    assert checks.seen["on_validation_batch_end"][2:] == (0, 1)


def test_on_before_backward_gets_the_loss_scaled_by_its_share_of_the_window() -> None:
    class Keeps(pl.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
            self.losses = [*getattr(self, "losses", []), float(loss.detach())]

    keeps = Keeps()
    tiny_trainer(callbacks=keeps, accumulate_grad_batches=2).fit(Regression(), loader(4))
    module, data = Regression(), list(loader(4))
    assert keeps.losses == [float(module.loss(batch).detach()) / 2 for batch in data]


def test_hooks_of_evaluation_may_leave_out_dataloader_idx() -> None:
    class Short(pl.Callback):
        calls = 0

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.calls += 1

        def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.calls += 10

    short, module = Short(), Model()
    trainer = tiny_trainer(callbacks=short)
    trainer.validate(module, loader(2), verbose=False)
    trainer.test(module, loader(2), verbose=False)
    assert short.calls == 11


def test_transfer_hooks_change_the_batch_and_those_of_the_data_module_go_first() -> None:
    class Moves(pl.DataModule):
        def train_dataloader(self) -> Any:
            return numbers(2)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch + 100

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch * 2

    class Module(Sums):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            raise AssertionError("the data module has one")

        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            assert (device.type, dataloader_idx) == ("cpu", 0)
            return super().transfer_batch_to_device(batch + 1000, device, dataloader_idx)

    module = Module()
    tiny_trainer().fit(module, datamodule=Moves())
    assert module.seen == [[2200, 2202]]


# --- which hooks run ------------------------------------------------------------------------------------------------
def test_a_run_that_overrides_nothing_dispatches_nothing() -> None:
    class Bare(pl.Module):
        pass

    trainer = tiny_trainer(callbacks=pl.Callback())
    hooks = Hooks(trainer, Bare(), trainer.callbacks, trainer.metrics)
    assert {name: getattr(hooks, name) for name in vars(hooks) if name.startswith("on_")} == {
        name: () for name in vars(hooks) if name.startswith("on_")
    }
    assert set(SHARED_HOOKS) < set(vars(hooks))


def test_hooks_are_found_once_a_call_also_those_set_on_the_object() -> None:
    calls: list[str] = []
    callback, late = pl.Callback(), pl.Callback()
    callback.on_train_batch_start = lambda trainer, pl_module, batch, batch_idx: calls.append(f"start {batch_idx}")  # type: ignore[assignment,misc]

    class SetsOne(Sums):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            late.on_train_batch_end = lambda *args: calls.append("late")  # type: ignore[method-assign]
            return super().training_step(batch, batch_idx)

    trainer = tiny_trainer(callbacks=[callback, late])
    trainer.fit(SetsOne(), numbers(4))
    assert calls == ["start 0", "start 1"]
    trainer.fit(SetsOne(), numbers(2))
    assert calls[2:] == ["start 0", "late"]


def test_a_hook_of_a_parent_class_or_mixin_counts() -> None:
    class Mixin:
        started = 0

        def on_train_start(self) -> None:
            self.started += 1

    class Child(Mixin, Sums):
        pass

    module = Child()
    tiny_trainer().fit(module, numbers(2))
    assert module.started == 1


def test_configure_callbacks_adds_callbacks_and_replaces_those_of_the_same_type() -> None:
    calls: list[str] = []

    class Named(pl.Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            calls.append(self.name)

    class Other(Named):
        pass

    class Brings(Sums):
        def configure_callbacks(self) -> Any:
            return Named("the module's")

    tiny_trainer(callbacks=[Named("the trainer's"), Other("other")]).fit(Brings(), numbers(2))
    assert calls == ["other", "the module's"]


def calls_per_rank(per_node: bool) -> list[str]:
    calls: list[str] = []

    class Prepares(Sums):
        def __init__(self) -> None:
            super().__init__()
            self.prepare_data_per_node = per_node

    module = recording("LM", Prepares, ["prepare_data", "setup", "on_fit_start", "teardown"], calls)
    os.environ["LOCAL_RANK"] = "0"  # two nodes of one rank each
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    os.environ["GROUP_RANK"] = os.environ["RANK"]
    tiny_trainer(strategy="ddp").fit(module, numbers(4))
    return calls


@pytest.mark.parametrize("per_node", [True, False])
def test_prepare_data_runs_once_a_node_or_once_and_all_else_on_every_rank(per_node: bool) -> None:
    first, second = run_ranks(calls_per_rank, 2, per_node)
    assert first == ["LM.prepare_data", "LM.setup", "LM.on_fit_start", "LM.teardown"]
    assert second == first[0 if per_node else 1 :]


# --- misspelt and removed hooks -------------------------------------------------------------------------------------
def with_method(name: str, base: type) -> Any:
    return type("Mine", (base,), {name: lambda self, *args: None})()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("on_train_epoch_ends", "on_train_epoch_end"),
        ("on_training_epoch_end", "on_train_epoch_end"),
        ("on_validation_epochs_end", "on_validation_epoch_end"),
        ("on_val_epoch_end", "on_validation_epoch_end"),
        ("on_trian_start", "on_train_start"),
        ("on_before_optimiser_step", "on_before_optimizer_step"),
        ("on_save_checkpoints", "on_save_checkpoint"),
        ("on_exeption", "on_exception"),
    ],
)
def test_a_misspelt_hook_of_a_callback_is_refused_when_the_trainer_is_built(wrong: str, right: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"Mine\.{wrong} is no hook and would never be called.*mean {right}\?"
    ):
        tiny_trainer(callbacks=with_method(wrong, pl.Callback))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("on_train_epoch_ends", "on_train_epoch_end"),
        ("on_validation_epoch_finish", "on_validation_epoch_end"),
        ("validation_steps", "validation_step"),
        ("configure_optimizer", "configure_optimizers"),
        ("configure_optimisers", "configure_optimizers"),
        ("predictstep", "predict_step"),
        ("train_dataloder", "train_dataloader"),
        ("optimizer_zerograd", "optimizer_zero_grad"),
        ("lr_schedulers_step", "lr_scheduler_step"),
    ],
)
def test_a_misspelt_hook_of_a_module_is_refused_before_anything_runs(wrong: str, right: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"Mine\.{wrong} is no hook.*Did you mean {right}\?"):
        tiny_trainer().fit(with_method(wrong, Sums), numbers(2))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("train_dataloder", "train_dataloader"), ("prepare_datas", "prepare_data"), ("setups", "setup")],
)
def test_a_misspelt_hook_of_a_data_module_is_refused(wrong: str, right: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"Mine\.{wrong} is no hook.*Did you mean {right}\?"):
        tiny_trainer().fit(Sums(), datamodule=with_method(wrong, Data))


@pytest.mark.parametrize(("name", "instead"), REMOVED_HOOKS.items())
def test_a_hook_that_lightning_removed_is_refused_with_the_way_to_write_it_now(name: str, instead: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"Mine\.{name} is no hook \(any more\).*: {instead}"):
        tiny_trainer().fit(with_method(name, Sums), numbers(2))
    with pytest.raises(ConfigurationError, match=rf"Mine\.{name} is no hook \(any more\)"):
        tiny_trainer(callbacks=with_method(name, pl.Callback))


@pytest.mark.parametrize(
    "name",
    ["step", "shared_step", "compute_loss", "on_gpu_only", "evaluate", "encode", "training_step_for_gan", "reset",
     "train_step", "my_validation_step", "setup_layers", "configure_sampler", "log_images"],
)  # fmt: skip
def test_helpers_may_have_names_of_their_own(name: str) -> None:
    tiny_trainer(callbacks=with_method(name, pl.Callback)).fit(with_method(name, Sums), numbers(2))
