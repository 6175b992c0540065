"""Gradient clipping on one process: by norm, by value, by the user's own hook, once a window and on whole gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import paceline as pl

from helpers.tiny import Regression, adam, assert_same, by_hand, global_batches, loader, tiny_trainer


@pytest.mark.parametrize("make_optimizer", [None, adam])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("arguments", "by"),
    [
        ({"gradient_clip_val": 0.3}, {"clip_norm": 0.3}),
        ({"gradient_clip_val": 0.3, "gradient_clip_algorithm": "norm"}, {"clip_norm": 0.3}),
        ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, {"clip_value": 0.1}),
        ({"gradient_clip_val": 1000}, {}),
        ({"gradient_clip_val": None}, {}),
        ({"gradient_clip_val": 0}, {}),
    ],
)
def test_clipping_gives_the_weights_of_a_hand_written_loop(
    make_optimizer: Any, accumulate: int, arguments: dict[str, Any], by: dict[str, float]
) -> None:
    module = Regression(make_optimizer)
    tiny_trainer(accumulate_grad_batches=accumulate, **arguments).fit(module, loader(14))
    expected = by_hand(global_batches(14, 2 * accumulate), make_optimizer, **by)
    assert_same(module, expected, 0.0 if accumulate == 1 else 1e-6)


def test_hooks_before_the_step_see_gradients_that_are_not_clipped() -> None:
    class Keeps(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.norm = float(nn.utils.get_total_norm([p.grad for p in pl_module.parameters()]))

    keeps = Keeps()
    trainer = tiny_trainer(gradient_clip_val=0.01, callbacks=keeps)
    trainer.fit(Regression(), loader(2))
    assert keeps.norm > 0.1
    assert float(trainer.callback_metrics["grad_norm"]) == pytest.approx(keeps.norm)


def test_clipping_by_value_computes_and_logs_no_norm() -> None:
    trainer = tiny_trainer(gradient_clip_val=0.1, gradient_clip_algorithm="value")
    trainer.fit(Regression(), loader(2))
    assert "grad_norm" not in trainer.callback_metrics


def test_an_own_clipping_hook_gets_the_arguments_and_may_use_clip_gradients() -> None:
    class Own(Regression):
        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            self.got = (gradient_clip_val, gradient_clip_algorithm)
            self.clip_gradients(optimizer, gradient_clip_algorithm="norm")

    module = Own()
    trainer = tiny_trainer(gradient_clip_val=0.2)
    trainer.fit(module, loader(6))
    assert module.got == (0.2, None)
    assert_same(module, by_hand(global_batches(6, 2), clip_norm=0.2))
    assert "grad_norm" in trainer.callback_metrics


def test_an_own_clipping_hook_runs_without_the_argument_too() -> None:
    class Own(Regression):
        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            assert gradient_clip_val is None
            nn.utils.clip_grad_value_(self.parameters(), 0.05)

    module = Own()
    tiny_trainer().fit(module, loader(6))
    assert_same(module, by_hand(global_batches(6, 2), clip_value=0.05))


def test_only_the_parameters_of_the_optimizer_are_clipped() -> None:
    class Half(Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.layer.weight], lr=0.1)

    module, straight = Half(), Half()
    tiny_trainer(gradient_clip_val=0.1).fit(module, loader(2))
    straight.loss(global_batches(2, 2)[0]).backward()
    nn.utils.clip_grad_norm_([straight.layer.weight], 0.1)
    straight.configure_optimizers().step()
    assert_same(module, straight)


def test_a_window_without_gradients_is_clipped_without_harm() -> None:
    class Unused(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer.bias.sum() * 0.0

    module = Unused()
    tiny_trainer(gradient_clip_val=0.1).fit(module, loader(2))
    assert_same(module, Regression())
