"""`fit` on one process: what it computes, what it counts, and what user code sees of it while it runs.

A hand-written loop over the same batches is what the weights are compared with, to the bit.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import paceline as pl
from paceline.trainer.plan import permutation

from helpers.tiny import (
    Regression,
    Sums,
    adam,
    assert_same,
    by_hand,
    global_batches,
    loader,
    numbers,
    samples,
    tiny_trainer,
    weights,
)


# --- the weights ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make_optimizer", [None, adam])
def test_fit_gives_the_weights_of_a_hand_written_loop(make_optimizer: Any) -> None:
    module = Regression(make_optimizer)
    tiny_trainer(max_epochs=3).fit(module, loader(7, batch_size=2))
    assert_same(module, by_hand(global_batches(7, 2) * 3, make_optimizer))


def test_a_shuffled_epoch_is_the_permutation_of_seed_and_epoch() -> None:
    torch.manual_seed(5)
    module = Regression()
    tiny_trainer(max_epochs=2).fit(module, loader(7, batch_size=2, shuffle=True))
    inputs, targets = samples(7).tensors
    batches = []
    for epoch in range(2):
        order = torch.tensor(permutation(7, 5, epoch)[:])
        batches += list(zip(inputs[order].split(2), targets[order].split(2), strict=True))
    assert_same(module, by_hand(batches))


def test_any_iterable_of_batches_trains() -> None:
    module = Regression()
    tiny_trainer(max_epochs=2).fit(module, global_batches(6, 2))
    assert_same(module, by_hand(global_batches(6, 2) * 2))


def test_a_generator_function_in_train_dataloader_trains() -> None:
    class Generated(Regression):
        def train_dataloader(self) -> Any:
            yield from global_batches(6, 2)

    module = Generated()
    tiny_trainer().fit(module)
    assert_same(module, by_hand(global_batches(6, 2)))


def test_buffers_change_as_in_a_hand_written_loop() -> None:
    class Normed(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(self.norm(inputs))

    module, straight = Normed(), Normed()
    tiny_trainer().fit(module, loader(8, batch_size=4))
    optimizer = straight.configure_optimizers()
    for batch in global_batches(8, 4):
        optimizer.zero_grad()
        straight.loss(batch).backward()
        optimizer.step()
    assert_same(dict(module.state_dict()), dict(straight.state_dict()))


# --- what training_step may look like -------------------------------------------------------------------------------
class Recorder(pl.Callback):
    """Keeps what `on_train_batch_end` got."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs)


class WithoutBatchIdx(Regression):
    def training_step(self, batch: Any) -> Any:
        return self.loss(batch)


class KeywordOnly(Regression):
    def training_step(self, batch: Any, *, batch_idx: int) -> Any:
        assert batch_idx in (0, 1, 2)
        return self.loss(batch)


class ReturnsDict(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return {"loss": loss, "twice": 2 * loss, "text": "kept"}


@pytest.mark.parametrize("kind", [WithoutBatchIdx, KeywordOnly, ReturnsDict])
def test_the_forms_of_training_step_train_alike(kind: type[Regression]) -> None:
    module = kind()
    tiny_trainer().fit(module, loader(6))
    assert_same(module, by_hand(global_batches(6, 2)))


def test_outputs_of_a_step_are_the_loss_as_returned_and_hold_no_graph() -> None:
    recorder = Recorder()
    tiny_trainer(callbacks=recorder, accumulate_grad_batches=2).fit(ReturnsDict(), loader(4))
    module = Regression()
    for outputs, batch in zip(recorder.outputs, global_batches(4, 2), strict=True):
        assert list(outputs) == ["loss", "twice", "text"]
        assert not outputs["loss"].requires_grad
        assert not outputs["twice"].requires_grad
        assert outputs["loss"] == module.loss(batch)


def test_a_returned_tensor_is_the_loss_in_the_outputs() -> None:
    recorder = Recorder()
    tiny_trainer(callbacks=recorder).fit(Regression(), loader(2))
    assert recorder.outputs[0]["loss"] == Regression().loss(global_batches(2, 2)[0])


def test_a_loss_of_one_element_counts_as_a_scalar() -> None:
    class OneElement(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch).reshape(1)

    module = OneElement()
    tiny_trainer().fit(module, loader(6))
    assert_same(module, by_hand(global_batches(6, 2)))


# --- None skips a batch ---------------------------------------------------------------------------------------------
class Skips(Regression):
    """Returns None for the batches named."""

    def __init__(self, *skipped: int) -> None:
        super().__init__()
        self.skipped = skipped

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx in self.skipped else self.loss(batch)


def test_a_window_of_nothing_but_none_takes_no_step() -> None:
    module, recorder = Skips(1), Recorder()
    trainer = tiny_trainer(callbacks=recorder)
    trainer.fit(module, loader(6))
    first, _, last = global_batches(6, 2)
    assert_same(module, by_hand([first, last]))
    assert trainer.global_step == 2
    assert not recorder.outputs[1]


def test_the_weight_of_a_none_leaves_its_window() -> None:
    module = Skips(1)
    tiny_trainer(accumulate_grad_batches=3).fit(module, loader(6))
    batches = global_batches(6, 2)
    without = tuple(torch.cat(parts) for parts in zip(batches[0], batches[2], strict=True))
    assert_same(module, by_hand([without]), 1e-6)


def test_an_epoch_of_nothing_but_none_ends_without_a_step() -> None:
    module = Skips(0, 1, 2)
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, loader(6))
    assert_same(module, Regression())
    assert (trainer.global_step, trainer.current_epoch) == (0, 2)


# --- counters and state ---------------------------------------------------------------------------------------------
class Watch(pl.Callback):
    """(global_step, current_epoch, is_last_batch, samples_seen) at the end of each batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, bool, int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((trainer.global_step, trainer.current_epoch, trainer.is_last_batch, trainer.samples_seen))


def test_counters_count_finished_work() -> None:
    watch = Watch()
    trainer = tiny_trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=watch)
    trainer.fit(Regression(), loader(6))
    assert watch.seen == [
        (0, 0, False, 0), (1, 0, False, 4), (2, 0, True, 6),
        (2, 1, False, 6), (3, 1, False, 10), (4, 1, True, 12),
    ]  # fmt: skip
    assert (trainer.global_step, trainer.current_epoch, trainer.samples_seen) == (4, 2, 12)


def test_the_state_tells_what_is_being_done() -> None:
    class States(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[str, ...]] = []

        def note(self) -> None:
            trainer = self.trainer
            flags = ("training", "validating", "testing", "predicting", "sanity_checking")
            on = [flag for flag in flags if getattr(trainer, flag)]
            self.seen.append((str(trainer.state.fn), str(trainer.state.status), *on))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.note()
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.note()

        test_step = validation_step
        predict_step = validation_step

    module = States()
    trainer = tiny_trainer(num_sanity_val_steps=1)
    assert str(trainer.state.status) == "initializing"
    data = loader(2)
    trainer.fit(module, data, data)
    trainer.validate(module, data)
    trainer.test(module, data)
    trainer.predict(module, data)
    assert module.seen == [
        ("fit", "running", "sanity_checking"),
        ("fit", "running", "training"),
        ("fit", "running", "validating"),
        ("validate", "running", "validating"),
        ("test", "running", "testing"),
        ("predict", "running", "predicting"),
    ]
    assert trainer.state.finished
    assert trainer.state.stage is None


def test_an_exception_is_told_to_callbacks_and_goes_on_after_the_teardown() -> None:
    class Fails(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("broken batch")

    class Told(pl.Callback):
        calls: tuple[str, ...] = ()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self.calls += (repr(exception),)

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.calls += (stage,)

    told = Told()
    trainer = tiny_trainer(callbacks=told)
    with pytest.raises(KeyError, match="broken batch"):
        trainer.fit(Fails(), loader(2))
    assert told.calls == ("KeyError('broken batch')", "fit")
    assert trainer.state.stopped
    assert not trainer.state.finished
    trainer.fit(Regression(), loader(2))  # the trainer can be used again
    assert trainer.state.finished


READ_BY_USERS = (
    "current_epoch global_step callback_metrics logged_metrics progress_bar_metrics logger loggers callbacks "
    "checkpoint_callback early_stopping_callback is_global_zero global_rank local_rank node_rank world_size "
    "strategy model datamodule lightning_module optimizers lr_scheduler_configs max_epochs max_steps min_epochs "
    "min_steps num_training_batches num_val_batches num_sanity_val_batches num_test_batches num_predict_batches "
    "train_dataloader val_dataloaders log_dir default_root_dir should_stop sanity_checking is_last_batch state "
    "interrupted training validating testing predicting fast_dev_run precision num_devices num_nodes device_ids "
    "ckpt_path limit_train_batches limit_val_batches val_check_interval check_val_every_n_epoch log_every_n_steps "
    "gradient_clip_val gradient_clip_algorithm accumulate_grad_batches num_sanity_val_steps overfit_batches"
)


def test_what_user_code_reads_of_a_trainer_is_there_before_in_and_after_fit() -> None:
    names = READ_BY_USERS.split()

    class Reads(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.read = {name: getattr(self.trainer, name) for name in names}
            return super().training_step(batch, batch_idx)

    trainer, module = tiny_trainer(accumulate_grad_batches=3), Reads()
    before = {name: getattr(trainer, name) for name in names}
    assert before["model"] is None
    assert before["accumulate_grad_batches"] == 3
    trainer.fit(module, loader(4))
    assert module.read["model"] is module.read["lightning_module"] is module
    assert module.read["num_training_batches"] == 2
    assert len(module.read["optimizers"]) == 1
    assert {name: getattr(trainer, name) for name in names}["current_epoch"] == 1


def test_estimated_stepping_batches_is_known_in_configure_optimizers() -> None:
    class Estimates(Regression):
        def configure_optimizers(self) -> Any:
            self.estimated = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    module = Estimates()
    trainer = tiny_trainer(max_epochs=3, accumulate_grad_batches=2)
    trainer.fit(module, loader(10))
    assert module.estimated == trainer.global_step == 9


def test_reading_a_property_of_the_module_works_without_a_trainer() -> None:
    module = Regression()
    assert (module.current_epoch, module.global_step, module.global_rank, module.local_rank) == (0, 0, 0, 0)
    assert module.device == torch.device("cpu")
    assert module.dtype == torch.float32
    assert module.logger is None
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        _ = module.trainer


# --- the module in its place ----------------------------------------------------------------------------------------
def test_layers_built_in_configure_model_are_trained() -> None:
    class BuiltLate(pl.Module):
        def configure_model(self) -> None:
            if not hasattr(self, "inner"):
                self.inner = Regression()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.inner.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = BuiltLate()
    tiny_trainer().fit(module, loader(6))
    assert_same(module.inner, by_hand(global_batches(6, 2)))


def test_layers_keep_the_mode_that_they_had() -> None:
    class Frozen(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Dropout()
            self.frozen.eval()
            self.modes: list[tuple[str, bool, bool]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.modes.append(("train", self.training, self.frozen.training))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.modes.append(("val", self.training, self.frozen.training))

    module = Frozen()
    tiny_trainer(num_sanity_val_steps=1).fit(module, loader(4, batch_size=2), loader(2))
    assert module.modes == [
        ("val", False, False), ("train", True, False), ("train", True, False), ("val", False, False)
    ]  # fmt: skip
    assert module.training
    assert not module.frozen.training


def test_gradients_are_off_in_validation_and_on_again_in_training() -> None:
    class Grads(Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.enabled = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    module = Grads()
    trainer = tiny_trainer(num_sanity_val_steps=1)
    trainer.fit(module, loader(4), loader(2))
    assert module.enabled == (False, False)  # no_grad: weights made in inference mode could not be trained
    trainer.validate(module, loader(2))
    assert module.enabled == (False, True)


def test_frozen_parameters_stay_as_they_are() -> None:
    module = Regression()
    module.layer.bias.requires_grad_(False)
    tiny_trainer().fit(module, loader(6))
    assert module.layer.bias == 0.125
    assert module.layer.weight[0, 0] != 0.5


def test_fit_without_an_optimizer_runs_and_changes_nothing() -> None:
    module = Regression(lambda parameters: None)
    trainer = tiny_trainer()
    with pytest.warns(UserWarning, match="no optimizer"):
        trainer.fit(module, loader(4))
    assert_same(module, Regression())


def test_a_module_can_be_pickled_after_fit_and_leaves_its_trainer_behind() -> None:
    import copy

    module = Regression(adam)
    tiny_trainer().fit(module, loader(4))
    twin = copy.deepcopy(module)
    assert_same(twin, module)
    assert twin._trainer is None


def test_detect_anomaly_names_the_operation_that_made_a_nan() -> None:
    class MakesNan(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.sqrt(self.layer.bias.sum() * 0.0) * 0.0

    with pytest.raises(RuntimeError, match="SqrtBackward0"):
        tiny_trainer(detect_anomaly=True).fit(MakesNan(), loader(2))
    assert not torch.is_anomaly_enabled()


# --- one trainer, several calls -------------------------------------------------------------------------------------
def test_one_trainer_fits_validates_tests_and_predicts() -> None:
    class All(Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.loss(batch))

        test_step = validation_step

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0])

    module, trainer = All(), tiny_trainer(max_epochs=5)
    before = trainer.validate(module, loader(8), verbose=False)[0]["loss"]
    trainer.fit(module, loader(8), loader(8))
    assert trainer.validate(dataloaders=loader(8), verbose=False)[0]["loss"] < before
    assert trainer.test(module, loader(8), verbose=False)[0]["loss"] < before
    assert len(trainer.predict(module, loader(8))) == 4


def test_a_data_module_gives_the_loaders() -> None:
    class Data(pl.DataModule):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[str] = []

        def prepare_data(self) -> None:
            self.calls.append("prepare_data")

        def setup(self, stage: str) -> None:
            self.calls.append(f"setup {stage}")

        def teardown(self, stage: str) -> None:
            self.calls.append(f"teardown {stage}")

        def train_dataloader(self) -> Any:
            self.calls.append("train_dataloader")
            return loader(6)

    module, data = Regression(), Data()
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=data)
    assert_same(module, by_hand(global_batches(6, 2)))
    assert data.calls == ["prepare_data", "setup fit", "train_dataloader", "teardown fit"]
    assert trainer.datamodule is data
    assert data.trainer is trainer


def test_a_data_module_may_stand_where_loaders_do() -> None:
    module = Regression()
    data = pl.DataModule.from_datasets(samples(6), batch_size=6)
    tiny_trainer().fit(module, data)
    assert_same(module, by_hand(global_batches(6, 6)), 1e-6)


def test_fit_works_in_a_side_thread() -> None:
    module = Regression()
    thread = threading.Thread(target=lambda: tiny_trainer().fit(module, loader(6)))
    thread.start()
    thread.join()
    assert_same(module, by_hand(global_batches(6, 2)))


# --- optimizers and schedulers --------------------------------------------------------------------------------------
class Scheduled(Regression):
    """Its rate falls to a tenth each time the scheduler steps; `options` are the scheduler dict's."""

    def __init__(self, **options: Any) -> None:
        super().__init__(lr=1.0)
        self.options = options
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **self.options}}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.layer.weight.sum() * 0.0


@pytest.mark.parametrize(
    ("options", "powers"),
    [
        ({}, [0, 0, 0, 1, 1, 1, 2, 2, 2]),
        ({"interval": "epoch", "frequency": 2}, [0, 0, 0, 0, 0, 0, 1, 1, 1]),
        ({"interval": "step"}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ({"interval": "step", "frequency": 2}, [0, 0, 1, 1, 2, 2, 3, 3, 4]),
    ],
)
def test_a_scheduler_steps_by_its_interval_and_frequency(options: dict[str, Any], powers: list[int]) -> None:
    module = Scheduled(**options)
    tiny_trainer(max_epochs=3).fit(module, loader(6))
    assert module.rates == pytest.approx([10.0**-power for power in powers])


def test_the_frequency_of_a_scheduler_counts_optimizer_steps_not_batches() -> None:
    module = Scheduled(interval="step", frequency=2)
    tiny_trainer(max_epochs=3, accumulate_grad_batches=2).fit(module, loader(6))
    assert module.rates == pytest.approx([10.0**-power for power in [0, 0, 0, 1, 1, 1, 2, 2, 2]])


def test_a_window_without_a_step_does_not_step_the_scheduler() -> None:
    class SkipsOne(Scheduled):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 0 else loss

    module = SkipsOne(interval="step")
    tiny_trainer().fit(module, loader(6))
    assert module.rates == pytest.approx([1.0, 1.0, 0.1])


class OnPlateau(Regression):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler, **self.options}}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer.weight.sum() * 0.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 1.0)


def test_a_plateau_scheduler_steps_with_the_validation_of_its_epoch() -> None:
    module = OnPlateau(monitor="val_loss")
    trainer = tiny_trainer(max_epochs=3, num_sanity_val_steps=0)
    trainer.fit(module, loader(4), loader(2))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25


def test_a_plateau_scheduler_by_step_steps_after_that_steps_validation() -> None:
    module = OnPlateau(monitor="val_loss", interval="step", frequency=2)
    trainer = tiny_trainer(num_sanity_val_steps=0, val_check_interval=2)
    trainer.fit(module, loader(8), loader(2))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5


def test_a_plateau_scheduler_whose_metric_nobody_logs_is_an_error_that_lists_what_was_logged() -> None:
    module = OnPlateau(monitor="val_los")
    with pytest.raises(pl.errors.ConfigurationError, match=r"monitors 'val_los'.*Logged are: val_loss.*Did you mean"):
        tiny_trainer(num_sanity_val_steps=0).fit(module, loader(4), loader(2))


def test_an_overridden_lr_scheduler_step_is_called_instead() -> None:
    class Own(Scheduled):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            self.calls = (*getattr(self, "calls", ()), metric)

    module = Own(interval="step")
    tiny_trainer().fit(module, loader(4))
    assert module.calls == (None, None)
    assert module.rates == [1.0, 1.0]


def test_an_overridden_optimizer_step_decides_whether_to_step() -> None:
    class EverySecond(Regression):
        losses: tuple[float, ...] = ()

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                self.losses += (float(optimizer_closure()),)

    module = EverySecond()
    trainer = tiny_trainer()
    trainer.fit(module, loader(8))
    batches = global_batches(8, 2)
    assert_same(module, by_hand(batches[1::2]))
    assert trainer.global_step == 2
    assert module.losses[0] == Regression().loss(batches[0])


def test_an_overridden_optimizer_step_may_step_without_the_closure() -> None:
    class Plain(Regression):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step()

    module = Plain()
    tiny_trainer().fit(module, loader(6))
    assert_same(module, by_hand(global_batches(6, 2)))


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lbfgs_repeats_its_window_as_a_hand_written_closure_does(accumulate: int) -> None:
    module = Regression(lbfgs)
    trainer = tiny_trainer(max_epochs=2, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(8, batch_size=4 // accumulate))
    straight = Regression()
    optimizer = lbfgs(straight.parameters())
    for batch in global_batches(8, 4) * 2:

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = straight.loss(batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_same(module, straight, 0.0 if accumulate == 1 else 1e-5)
    assert trainer.global_step == 4


def test_what_a_step_logs_is_logged_once_however_often_lbfgs_repeats_it() -> None:
    class Logs(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("count", 1.0, reduce_fx="sum", on_step=False, on_epoch=True)
            self.log("loss", loss)
            return loss

    trainer = tiny_trainer(log_every_n_steps=1)
    trainer.fit(Logs(lbfgs), loader(4, batch_size=4))
    assert trainer.callback_metrics["count"] == 1
    assert trainer.callback_metrics["loss"] == Regression().loss(global_batches(4, 4)[0])


def test_own_zero_grad_and_backward_are_called_in_their_place() -> None:
    class Own(Regression):
        calls: tuple[str, ...] = ()

        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            self.calls += (f"zero_grad {epoch} {batch_idx}",)
            optimizer.zero_grad(set_to_none=False)

        def backward(self, loss: Tensor) -> None:
            self.calls += ("backward",)
            loss.backward()

    module = Own()
    tiny_trainer(accumulate_grad_batches=2).fit(module, loader(6))
    assert_same(module, by_hand([*global_batches(4, 4), *global_batches(6, 2)[2:]]), 1e-6)
    assert module.calls == ("zero_grad 0 0", "backward", "backward", "zero_grad 0 2", "backward")


# --- manual optimization --------------------------------------------------------------------------------------------
class ByHand(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_manual_optimization_gives_the_weights_of_a_hand_written_loop() -> None:
    module = ByHand()
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, loader(6))
    assert_same(module, by_hand(global_batches(6, 2) * 2))
    assert trainer.global_step == 6


def test_under_manual_optimization_global_step_counts_batches_in_which_any_optimizer_stepped() -> None:
    class Two(pl.Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.left, self.right = Regression(), Regression()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for number, (part, optimizer) in enumerate(zip((self.left, self.right), self.optimizers(), strict=True)):
                if batch_idx == 2 or (batch_idx == 1 and number == 1):
                    continue
                optimizer.zero_grad()
                self.manual_backward(part.loss(batch))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.left, self.right)]

    module = Two()
    trainer = tiny_trainer()
    trainer.fit(module, loader(6))
    first, second, _ = global_batches(6, 2)
    assert_same(module.left, by_hand([first, second]))
    assert_same(module.right, by_hand([first]))
    assert trainer.global_step == 2


def test_max_steps_ends_manual_optimization_too() -> None:
    trainer = tiny_trainer(max_steps=4)
    trainer.fit(ByHand(), loader(6))
    assert trainer.global_step == 4


def test_manual_backward_without_manual_optimization_says_what_to_set() -> None:
    class Wrong(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.manual_backward(self.loss(batch))

    with pytest.raises(pl.errors.ConfigurationError, match="automatic_optimization = False"):
        tiny_trainer().fit(Wrong(), loader(2))


# --- skipping the rest of an epoch ----------------------------------------------------------------------------------
class StopsEpochs(pl.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == self.at else None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_minus_one_from_on_train_batch_start_skips_the_rest_of_the_epoch_and_the_window_begun(accumulate: int) -> None:
    module = Regression()
    trainer = tiny_trainer(max_epochs=2, accumulate_grad_batches=accumulate, callbacks=StopsEpochs(3))
    trainer.fit(module, loader(12))
    if accumulate == 1:
        expected = by_hand(global_batches(12, 2)[:3] * 2)
    else:
        expected = by_hand(global_batches(12, 4)[:1] * 2)  # batch 2 began a window, which is dropped
    assert_same(module, expected, 1e-6)
    assert trainer.global_step == (6 if accumulate == 1 else 2)
    assert trainer.current_epoch == 2


# --- precision of the arithmetic in long windows --------------------------------------------------------------------
def test_the_loss_weight_of_a_module_makes_token_means_exact() -> None:
    """Batches with masks: the gradient is that of the mean over all tokens of the window."""

    class Tokens(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            inputs, targets, mask = batch
            return (F.mse_loss(self(inputs), targets, reduction="none") * mask).sum() / mask.sum()

        def loss_weight(self, batch: Any) -> Any:
            return batch[2].sum()

    inputs, targets = samples(6).tensors
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    module = Tokens()
    data = DataLoader(TensorDataset(inputs, targets, mask), batch_size=2)
    tiny_trainer(accumulate_grad_batches=3).fit(module, data)
    kept = mask.bool()
    assert_same(module, by_hand([(inputs[kept], targets[kept])]), 1e-6)


def test_a_batch_of_weight_zero_beside_a_skipped_one_changes_nothing() -> None:
    class Weighted(Skips):
        def loss_weight(self, batch: Any) -> Any:
            return 0.0 if torch.equal(batch[0], global_batches(4, 2)[0][0]) else 2.0

    module = Weighted(1)
    tiny_trainer(accumulate_grad_batches=2).fit(module, loader(4))
    assert all(bool(value.isfinite().all()) for value in weights(module).values())
    assert_same(module, Regression())


def test_samples_are_counted_from_numbers_tensors_and_dicts() -> None:
    class Reads(Sums):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["x"], batch_idx)

    data = [{"x": torch.arange(3)}, {"x": torch.arange(5)}]
    trainer = tiny_trainer()
    trainer.fit(Reads(), data)
    assert trainer.samples_seen == 8
    trainer = tiny_trainer()
    trainer.fit(Sums(), numbers(5))
    assert trainer.samples_seen == 5
    assert math.isfinite(float(trainer.model.weight))
