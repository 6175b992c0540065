"""Precisions in whole runs on the CPU: the types of weights, activations and losses, and steps that a scaler skips."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import paceline as pl
from paceline.trainer.prefetch import move

from helpers.tiny import Regression, adam, assert_same, by_hand, global_batches, loader, tiny_trainer, weights

TYPES = {
    # precision: (weights, batch, activations, loss)
    "32-true": (torch.float32, torch.float32, torch.float32, torch.float32),
    "64-true": (torch.float64, torch.float64, torch.float64, torch.float64),
    "bf16-true": (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "16-true": (torch.float16, torch.float16, torch.float16, torch.float16),
    "bf16-mixed": (torch.float32, torch.float32, torch.bfloat16, torch.float32),
    "16-mixed": (torch.float32, torch.float32, torch.float16, torch.float32),
}


class Types(Regression):
    """Keeps the types of its parameters, batch, activations, loss and of a tensor made in a step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.types: dict[str, list[tuple[torch.dtype, ...]]] = {"train": [], "val": [], "predict": []}

    def note(self, stage: str, batch: Any) -> Tensor:
        outputs = self(batch[0])
        loss = nn.functional.mse_loss(outputs, batch[1])
        self.types[stage].append((self.layer.weight.dtype, batch[0].dtype, outputs.dtype, loss.dtype))
        self.made = torch.zeros(1).dtype
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.note("train", batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.note("val", batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.note("predict", batch)


@pytest.mark.parametrize("precision", TYPES)
def test_every_step_computes_in_its_precision(precision: str) -> None:
    module = Types()
    trainer = tiny_trainer(precision=precision, num_sanity_val_steps=0)
    trainer.fit(module, loader(4), loader(2))
    trainer.predict(module, loader(2))
    assert module.types == {"train": [TYPES[precision]] * 2, "val": [TYPES[precision]], "predict": [TYPES[precision]]}
    assert module.made == (TYPES[precision][0] if precision.endswith("true") else torch.float32)
    assert torch.get_default_dtype() == torch.float32
    assert not torch.is_autocast_enabled("cpu")
    assert trainer.precision == precision


class Sample(NamedTuple):
    inputs: Tensor
    targets: Tensor


@dataclass
class Sampled:
    inputs: Tensor
    targets: Tensor


@pytest.mark.parametrize("form", [dict, OrderedDict, UserDict])
def test_a_batch_that_is_like_a_dict_is_cast_and_moved_into_another(form: Any) -> None:
    batch = form(inputs=torch.zeros(2), rest=form(targets=torch.ones(2), names=["a", "b"]))
    moved = move(batch, torch.device("meta"), torch.float64)
    assert type(moved) is type(moved["rest"]) is form
    assert moved["rest"]["names"] == ["a", "b"]
    for tensor in (moved["inputs"], moved["rest"]["targets"]):
        assert (tensor.device.type, tensor.dtype) == ("meta", torch.float64)
    assert batch["inputs"].dtype == torch.float32


@pytest.mark.parametrize("form", [Sample, Sampled])
def test_a_batch_with_named_fields_is_cast_and_moved_into_another(form: Any) -> None:
    moved = move(form(torch.zeros(2), torch.ones(2)), torch.device("meta"), torch.float64)
    assert type(moved) is form
    assert all((part.device.type, part.dtype) == ("meta", torch.float64) for part in (moved.inputs, moved.targets))


def test_64_true_gives_the_weights_of_a_double_precision_loop() -> None:
    module = Regression(adam)
    tiny_trainer(precision="64-true").fit(module, loader(8))
    straight = Regression(adam).double()
    optimizer = straight.configure_optimizers()
    for inputs, targets in global_batches(8, 2):
        optimizer.zero_grad()
        straight.loss((inputs.double(), targets.double())).backward()
        optimizer.step()
    assert_same(module, straight)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_gives_the_weights_of_an_autocast_loop(precision: str) -> None:
    module = Regression()
    tiny_trainer(precision=precision).fit(module, loader(8))
    straight = Regression()
    optimizer, scaler = straight.configure_optimizers(), torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")
    for batch in global_batches(8, 2):
        optimizer.zero_grad()
        with torch.autocast("cpu", TYPES[precision][2]):
            loss = straight.loss(batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same(module, straight)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision_stays_near_the_weights_of_float32(precision: str) -> None:
    module = Regression()
    tiny_trainer(precision=precision).fit(module, loader(8))
    assert_same({k: v.float() for k, v in weights(module).items()}, by_hand(global_batches(8, 2)), 0.05)


def test_clipping_sees_the_gradients_unscaled() -> None:
    def norms(precision: str) -> list[float]:
        class Keeps(pl.Callback):
            found: tuple[float, ...] = ()

            def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
                parameters = list(pl_module.parameters())
                self.found += (float(nn.utils.get_total_norm([p.grad for p in parameters])),)

        keeps = Keeps()
        trainer = tiny_trainer(precision=precision, gradient_clip_val=SMALL / 2, callbacks=keeps)
        trainer.fit(Overflows(), loader(4))
        return [*keeps.found, float(trainer.callback_metrics["grad_norm"])]

    assert norms("16-mixed") == pytest.approx(norms("32-true"), rel=1e-2)


# --- steps that the scaler skips ------------------------------------------------------------------------------------
SMALL = 2.0**-10  # for a loss whose gradients fit into float16 when the scaler's first scale, 2**16, multiplies them


class Overflows(Regression):
    """The gradients of the batches named are infinite."""

    def __init__(self, *at: int) -> None:
        super().__init__()
        self.at = at
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log("loss", 1.0)
        return self.loss(batch) * (float("inf") if batch_idx in self.at else SMALL)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1 / SMALL)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def test_a_step_that_the_scaler_skips_advances_neither_global_step_nor_schedulers() -> None:
    module = Overflows(1)
    trainer = tiny_trainer(precision="16-mixed")
    trainer.fit(module, loader(8))
    assert trainer.global_step == 3
    assert module.rates == pytest.approx([rate / SMALL for rate in (0.1, 0.05, 0.05, 0.025)])
    assert trainer.samples_seen == 8
    assert trainer.scaler.get_scale() == 2.0**15


def test_what_a_skipped_step_leaves_is_the_weights_without_its_batch() -> None:
    module = Overflows(0, 2)
    tiny_trainer(precision="16-mixed").fit(module, loader(8))
    without = Regression()
    rates = iter([0.1, 0.05])
    for number, batch in enumerate(global_batches(8, 2)):
        if number in (0, 2):
            continue
        optimizer = torch.optim.SGD(without.parameters(), lr=next(rates))
        optimizer.zero_grad()
        without.loss(batch).backward()
        optimizer.step()
    assert_same(module, without, 1e-2)


def test_max_steps_counts_the_steps_that_were_taken() -> None:
    module = Overflows(0, 1)
    trainer = tiny_trainer(precision="16-mixed", max_steps=2)
    trainer.fit(module, loader(12))
    assert trainer.global_step == 2
    assert len(module.rates) == 4


def test_a_skipped_first_step_is_no_point_of_the_logs() -> None:
    steps = []

    class Notes(pl.Callback):
        def on_log(self, trainer: Any, pl_module: Any, metrics: dict[str, float], step: int) -> None:
            steps.append(step)

    tiny_trainer(precision="16-mixed", callbacks=Notes(), log_every_n_steps=1).fit(Overflows(0, 2), loader(8))
    assert steps == [1, 2]


def test_an_infinity_anywhere_in_a_window_skips_its_step() -> None:
    module = Overflows(1)
    trainer = tiny_trainer(precision="16-mixed", accumulate_grad_batches=2)
    trainer.fit(module, loader(8))
    assert trainer.global_step == 1


def test_manual_optimization_counts_skipped_steps_no_more_than_automatic() -> None:
    class ByHand(Overflows):
        def __init__(self) -> None:
            super().__init__(1)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    trainer = tiny_trainer(precision="16-mixed")
    trainer.fit(ByHand(), loader(8))
    assert trainer.global_step == 3


def test_an_own_optimizer_step_is_told_of_no_step_where_it_was_skipped() -> None:
    class Own(Overflows):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)

    trainer = tiny_trainer(precision="16-mixed")
    trainer.fit(Own(1), loader(8))
    assert trainer.global_step == 3
