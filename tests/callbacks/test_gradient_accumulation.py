"""`GradientAccumulationScheduler`: windows grow and shrink between epochs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paceline.callbacks import GradientAccumulationScheduler, LambdaCallback
from paceline.errors import ConfigurationError

from helpers.ranks import run_ranks
from helpers.tiny import Regression, adam, assert_same, by_hand, global_batches, loader, tiny_trainer, weights

SCHEDULE = {1: 2, 3: 4}


def batches_of_the_schedule() -> list[Any]:
    """Four epochs of 16 samples: batches of 2, 4, 4, 8."""
    return [batch for size in (2, 4, 4, 8) for batch in global_batches(16, size)]


def test_the_factor_of_an_epoch() -> None:
    scheduler = GradientAccumulationScheduler(SCHEDULE)
    assert [scheduler.get_accumulate_grad_batches(epoch) for epoch in range(6)] == [1, 2, 2, 4, 4, 4]
    assert scheduler.going_to_accumulate_grad_batches()
    assert not GradientAccumulationScheduler({0: 1}).going_to_accumulate_grad_batches()


@pytest.mark.parametrize("scheduling", [{}, {-1: 2}, {0: 0}, {0: 1.5}, {"0": 2}, {0: True}])
def test_a_wrong_schedule_is_refused(scheduling: Any) -> None:
    with pytest.raises(ConfigurationError, match="scheduling"):
        GradientAccumulationScheduler(scheduling)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="contradict"):
        tiny_trainer(callbacks=[GradientAccumulationScheduler({0: 2})], accumulate_grad_batches=4).fit(
            Regression(), loader(8)
        )
    with pytest.raises(ConfigurationError, match="contradicts global_batch_size=4"):
        tiny_trainer(callbacks=[GradientAccumulationScheduler({0: 2})], global_batch_size=4).fit(
            Regression(), loader(8)
        )
    module = Regression()
    module.automatic_optimization = False
    with pytest.raises(ConfigurationError, match="manual optimization"):
        tiny_trainer(callbacks=[GradientAccumulationScheduler({0: 2})]).fit(module, loader(8))


def test_the_knob_is_public() -> None:
    trainer = tiny_trainer(accumulate_grad_batches=3)
    assert trainer.accumulate_grad_batches == 3
    trainer.accumulate_grad_batches = 4
    trainer.fit(Regression(), loader(16))
    assert trainer.global_step == 2
    with pytest.raises(ConfigurationError, match="accumulate_grad_batches=0"):
        trainer.accumulate_grad_batches = 0


def test_the_weights_are_those_of_larger_batches() -> None:
    module, seen = Regression(adam), []
    note = LambdaCallback(
        on_train_epoch_start=lambda trainer, _: seen.append(trainer.accumulate_grad_batches),
        on_train_epoch_end=lambda trainer, _: seen.append(trainer.global_step),
    )
    trainer = tiny_trainer(callbacks=[GradientAccumulationScheduler(SCHEDULE), note], max_epochs=4)
    trainer.fit(module, loader(16))
    assert seen == [1, 8, 2, 12, 2, 16, 4, 18]
    assert_same(module, by_hand(batches_of_the_schedule(), adam), 1e-6)


def test_the_estimate_of_steps_knows_the_schedule() -> None:
    estimates = []

    class Estimating(Regression):
        def configure_optimizers(self) -> Any:
            estimates.append(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

    for limits in ({"max_epochs": 4}, {"max_epochs": 4, "max_steps": 17}):
        trainer = tiny_trainer(callbacks=[GradientAccumulationScheduler(SCHEDULE)], **limits)
        trainer.fit(Estimating(), loader(16))
        assert trainer.global_step == estimates[-1]
    assert estimates == [18, 17]


def set_once(trainer: Any, module: Any) -> None:
    if trainer.current_epoch == 1:
        trainer.accumulate_grad_batches = 2


@pytest.mark.parametrize("steps", [5, 8, 9, 12, 17])
@pytest.mark.parametrize(
    "accumulates",
    [lambda: GradientAccumulationScheduler(SCHEDULE), lambda: LambdaCallback(on_train_epoch_start=set_once)],
)
def test_a_resumed_run_goes_on_in_its_window(accumulates: Any, steps: int) -> None:
    def trainer(**limits: Any) -> Any:
        return tiny_trainer(callbacks=[accumulates()], **limits)

    first = trainer(max_steps=steps)
    first.fit(Regression(adam), loader(16, shuffle=True))
    path = first.save_checkpoint("middle.ckpt")
    resumed, straight = Regression(adam), Regression(adam)
    torch.manual_seed(99)
    trainer(max_epochs=4).fit(resumed, loader(16, shuffle=True), ckpt_path=path)
    torch.manual_seed(0)
    trainer(max_epochs=4).fit(straight, loader(16, shuffle=True))
    assert_same(resumed, straight)


def test_batches_of_a_stream_accumulate_too() -> None:
    trainer = tiny_trainer(callbacks=[GradientAccumulationScheduler({1: 2})], max_epochs=2)
    trainer.fit(Regression(), list(loader(8)))
    assert trainer.global_step == 4 + 2


def fits_by_the_schedule(resume_from: str = "", save_to: str = "") -> Any:
    module = Regression(adam)
    trainer = tiny_trainer(
        callbacks=[GradientAccumulationScheduler(SCHEDULE)],
        strategy="ddp",
        devices=2,
        max_epochs=4,
        max_steps=7 if save_to else -1,
    )
    trainer.fit(module, loader(16, batch_size=1), ckpt_path=resume_from or None)
    return trainer.save_checkpoint(save_to) if save_to else weights(module)


def test_two_ranks_share_the_windows() -> None:
    for result in run_ranks(fits_by_the_schedule, 2):
        assert_same(result, by_hand(batches_of_the_schedule(), adam), 1e-6)


def test_a_run_of_two_ranks_is_resumed_on_one_with_the_same_windows(tmp_path: Any) -> None:
    path = run_ranks(fits_by_the_schedule, 2, save_to=str(tmp_path / "saved.ckpt"))[0]
    module = Regression(adam)
    trainer = tiny_trainer(callbacks=[GradientAccumulationScheduler(SCHEDULE)], max_epochs=4)
    trainer.fit(module, loader(16, batch_size=1), ckpt_path=path)
    assert trainer.global_step == 18
    assert_same(module, by_hand(batches_of_the_schedule(), adam), 1e-6)
