"""`WeightAveraging` and `EMAWeightAveraging`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from paceline.callbacks import EMAWeightAveraging, LambdaCallback, ModelCheckpoint, WeightAveraging
from paceline.callbacks.averaged_weights import AveragedWeights
from paceline.errors import ConfigurationError
from paceline.trainer.checkpoint.load import load

from helpers.ranks import run_ranks
from helpers.tiny import Regression, adam, assert_same, loader, tiny_trainer, weights

DECAY = 0.8


class Net(Regression):
    """With BatchNorm, whose buffers move in training, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__(adam)
        torch.manual_seed(3)
        self.norm = nn.BatchNorm1d(3)
        self.body = nn.Linear(3, 3, bias=False)
        self.again = nn.Linear(3, 3, bias=False)
        self.again.weight = self.body.weight
        self.evaluated: list[dict[str, Tensor]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(self.again(self.body(self.norm(inputs))))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.evaluated.append(state(self))
        self.log("val_loss", self.loss(batch))


class Reference(LambdaCallback):
    """torch's own AveragedModel, updated after each step that `when` names (counted from 0)."""

    def __init__(self, when: Any = lambda step: True, **options: Any) -> None:
        super().__init__(on_train_batch_end=self.update)
        self.when, self.options = when, options
        self.model: AveragedModel | None = None
        self.raw: list[dict[str, Tensor]] = []

    def update(self, trainer: Any, module: Any, *_: Any) -> None:
        if self.model is None:
            plain = Net()
            self.model = AveragedModel(plain, use_buffers=True, **self.options)
        if self.when(trainer.global_step - 1):
            self.model.update_parameters(module)
        self.raw.append(state(module))

    @property
    def average(self) -> dict[str, Tensor]:
        assert self.model is not None
        return {name: tensor for name, tensor in state(self.model.module).items() if "tracked" not in name}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def floats(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state(module).items() if "tracked" not in name}


def untracked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "tracked" not in name}


# torch's own default refuses whole numbers, so the reference gets an avg_fn that is the same mean.
def mean(averaged: Tensor, current: Tensor, count: Any) -> Tensor:
    return averaged + (current - averaged) / (count + 1)


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({}, {"avg_fn": mean}),
        ({"avg_fn": mean}, {"avg_fn": mean}),
        ({"avg_fn": get_ema_avg_fn(DECAY)}, {"avg_fn": get_ema_avg_fn(DECAY)}),
        ({"multi_avg_fn": get_ema_multi_avg_fn(DECAY)}, {"avg_fn": get_ema_avg_fn(DECAY)}),
    ],
)
def test_the_average_is_that_of_torch(options: Any, reference: Any) -> None:
    module, expected = Net(), Reference(**reference)
    trainer = tiny_trainer(callbacks=[expected, WeightAveraging(**options)], max_epochs=2)
    trainer.fit(module, loader(8))
    assert_same(floats(module), expected.average, 1e-6)
    assert module.norm.num_batches_tracked == 8


def test_exponential_averages_at_chosen_steps() -> None:
    module = Net()
    expected = Reference(lambda step: step >= 3 and step % 2 == 0, avg_fn=get_ema_avg_fn(DECAY))
    ema = EMAWeightAveraging(decay=DECAY, update_every_n_steps=2, update_starting_at_step=3)
    tiny_trainer(callbacks=[expected, ema], max_epochs=3).fit(module, loader(8))
    assert_same(floats(module), expected.average, 1e-6)


def test_moments_of_an_exponential_average() -> None:
    def steps(ema: EMAWeightAveraging) -> list[int]:
        return [step for step in range(8) if ema.should_update(step_idx=step)]

    assert steps(EMAWeightAveraging()) == list(range(8))
    assert steps(EMAWeightAveraging(update_every_n_steps=3)) == [0, 3, 6]
    assert steps(EMAWeightAveraging(update_every_n_steps=0)) == []
    by_epoch = EMAWeightAveraging(update_every_n_steps=0, update_starting_at_epoch=2)
    assert [epoch for epoch in range(4) if by_epoch.should_update(epoch_idx=epoch)] == [2, 3]
    assert not EMAWeightAveraging().should_update(epoch_idx=5)


def test_averages_of_epochs() -> None:
    class OfEpochs(WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return epoch_idx is not None and epoch_idx >= 1

    module, ends = Net(), []
    note = LambdaCallback(on_train_epoch_end=lambda _, module: ends.append(weights(module)))
    tiny_trainer(callbacks=[note, OfEpochs()], max_epochs=3).fit(module, loader(8))
    assert_same(module, {name: (ends[1][name] + ends[2][name]) / 2 for name in ends[1]}, 1e-6)


def test_training_goes_on_with_its_own_weights() -> None:
    with_average, without = Reference(avg_fn=mean), Reference(avg_fn=mean)
    tiny_trainer(callbacks=[with_average, WeightAveraging()], max_epochs=2).fit(Net(), loader(8), loader(4))
    tiny_trainer(callbacks=[without], max_epochs=2).fit(Net(), loader(8), loader(4))
    for left, right in zip(with_average.raw, without.raw, strict=True):
        assert_same(left, right)


def test_validation_sees_the_average_from_the_first_hook_to_the_last() -> None:
    module, expected, at_hooks = Net(), Reference(avg_fn=mean), []
    expected_then: list[dict[str, Tensor]] = []
    note = {
        name: lambda _, module: at_hooks.append(floats(module))
        for name in ("on_validation_epoch_start", "on_validation_epoch_end")
    }
    notice = LambdaCallback(on_validation_start=lambda *_: expected_then.append(expected.average), **note)
    trainer = tiny_trainer(
        callbacks=[expected, WeightAveraging(), notice], max_epochs=2, val_check_interval=2, num_sanity_val_steps=0
    )
    trainer.fit(module, loader(8), loader(4))
    assert len(module.evaluated) == 4
    for index, seen in enumerate(module.evaluated):
        assert_same(untracked(seen), expected_then[index], 1e-6)
        assert_same(at_hooks[2 * index], untracked(seen))
        assert_same(at_hooks[2 * index + 1], untracked(seen))


def test_before_the_first_update_the_present_weights_are_used() -> None:
    module, expected = Net(), Reference(avg_fn=mean)
    never = EMAWeightAveraging(update_starting_at_step=1000)
    tiny_trainer(callbacks=[expected, never], max_epochs=1).fit(module, loader(8), loader(4))
    assert_same(state(module), expected.raw[-1])
    assert_same(module.evaluated[-1], expected.raw[-1])


class Failing(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        raise KeyError("in validation")


def test_weights_of_training_are_put_back_when_validation_raises() -> None:
    module, expected = Failing(), Reference(avg_fn=mean)
    trainer = tiny_trainer(callbacks=[expected, WeightAveraging()], num_sanity_val_steps=0)
    with pytest.raises(KeyError):
        trainer.fit(module, loader(8), loader(4))
    assert_same(state(module), expected.raw[-1])


def test_buffers_may_be_left_alone() -> None:
    module, expected = Net(), Reference(avg_fn=mean)
    tiny_trainer(callbacks=[expected, WeightAveraging(use_buffers=False)], max_epochs=2).fit(module, loader(8))
    assert_same(module.norm.running_mean, expected.raw[-1]["norm.running_mean"])
    assert_same(module.layer.weight.detach(), expected.average["layer.weight"], 1e-6)


def test_the_average_may_be_kept_on_another_device() -> None:
    results = []
    for device in (None, "cpu"):
        module = Net()
        tiny_trainer(callbacks=[WeightAveraging(device=device)], max_epochs=2).fit(module, loader(8), loader(4))
        results.append(state(module))
    assert_same(*results)


def test_accumulation_averages_once_a_window() -> None:
    asked = []

    class Asking(WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            asked.append((step_idx, epoch_idx))
            return False

    tiny_trainer(callbacks=[Asking()], accumulate_grad_batches=2, max_epochs=2).fit(Net(), loader(8))
    assert asked == [(0, None), (1, None), (None, 0), (2, None), (3, None), (None, 1)]


# --- checkpoints -------------------------------------------------------------------------------------------------
def test_a_checkpoint_has_the_average_as_its_weights(tmp_path: Path) -> None:
    for weights_only in (False, True):
        module, expected = Net(), Reference(avg_fn=mean)
        saving = ModelCheckpoint(tmp_path / str(weights_only), save_weights_only=weights_only)
        trainer = tiny_trainer(callbacks=[expected, WeightAveraging(), saving], enable_checkpointing=True)
        trainer.fit(module, loader(8), loader(4))
        saved = load(saving.best_model_path).model
        assert set(saved) == set(module.state_dict())
        assert_same(untracked(saved), expected.average, 1e-6)
        assert_same(saved["again.weight"], saved["body.weight"])
        torch.manual_seed(17)
        loaded = Net.load_from_checkpoint(saving.best_model_path)
        assert_same(floats(loaded), expected.average, 1e-6)


@pytest.mark.parametrize("steps", [1, 3, 4, 6])
def test_a_resumed_run_is_exact(steps: int) -> None:
    def trainer(reference: Reference, **limits: Any) -> Any:
        callbacks = [reference, EMAWeightAveraging(decay=DECAY, update_every_n_steps=2)]
        return tiny_trainer(callbacks=callbacks, **limits)

    straight, raw = Net(), Reference(avg_fn=mean)
    trainer(raw, max_epochs=3).fit(straight, loader(8), loader(4))
    first = trainer(Reference(avg_fn=mean), max_steps=steps)
    first.fit(Net(), loader(8), loader(4))
    path = first.save_checkpoint("after the fit.ckpt")
    resumed, resumed_raw = Net(), Reference(avg_fn=mean)
    trainer(resumed_raw, max_epochs=3).fit(resumed, loader(8), loader(4), ckpt_path=path)
    assert_same(state(resumed), state(straight))
    for left, right in zip(resumed_raw.raw, raw.raw[steps:], strict=True):
        assert_same(left, right)
    assert_same(resumed.evaluated[-1], straight.evaluated[-1])


def test_a_checkpoint_from_within_validation_is_whole() -> None:
    """One that a callback before this one saves while the average is swapped in."""
    paths = []
    saving = LambdaCallback(on_validation_epoch_end=lambda t, _: paths.append(t.save_checkpoint("within.ckpt")))
    quiet = {"max_epochs": 2, "num_sanity_val_steps": 0, "val_check_interval": 2}
    straight = Net()
    tiny_trainer(callbacks=[saving, WeightAveraging()], **quiet).fit(straight, loader(8), loader(4))
    resumed = Net()
    tiny_trainer(callbacks=[WeightAveraging()], **quiet).fit(resumed, loader(8), loader(4), ckpt_path=paths[0])
    assert_same(state(resumed), state(straight))


def test_a_run_with_nothing_left_to_train_ends_with_the_average() -> None:
    module = Net()
    trainer = tiny_trainer(callbacks=[WeightAveraging()], max_epochs=1)
    trainer.fit(module, loader(8))
    path = trainer.save_checkpoint("end.ckpt")
    again = Net()
    tiny_trainer(callbacks=[WeightAveraging()], max_epochs=1).fit(again, loader(8), ckpt_path=path)
    assert_same(state(again), state(module))


def test_a_checkpoint_without_an_average_starts_one_and_one_with_it_can_be_tested() -> None:
    plain = tiny_trainer(max_steps=2)
    plain.fit(Net(), loader(8))
    path = plain.save_checkpoint("plain.ckpt")
    module = Net()
    trainer = tiny_trainer(callbacks=[WeightAveraging()], max_epochs=1)
    trainer.fit(module, loader(8), ckpt_path=path)
    averaged = state(module)
    path = trainer.save_checkpoint("averaged.ckpt")
    trainer.validate(module, loader(4), ckpt_path=path, verbose=False)
    assert_same(module.evaluated[-1], averaged)
    assert_same(state(module), averaged)


def test_state_survives_a_round_trip_without_a_run() -> None:
    callback = EMAWeightAveraging()
    tiny_trainer(callbacks=[callback]).fit(Net(), loader(8))
    saved = callback.state_dict()
    assert saved["count"] == 4
    other = EMAWeightAveraging()
    other.load_state_dict(saved)
    assert other.state_dict() == saved


def test_misuse_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Give one of them"):
        WeightAveraging(avg_fn=mean, multi_avg_fn=get_ema_multi_avg_fn())
    with pytest.raises(ConfigurationError, match=r"decay=1\.5"):
        EMAWeightAveraging(decay=1.5)
    with pytest.raises(ConfigurationError, match="update_every_n_steps=-1"):
        EMAWeightAveraging(update_every_n_steps=-1)


# --- ranks -------------------------------------------------------------------------------------------------------
def averages_on_a_rank(strategy: str, save_to: str = "", resume_from: str | None = None) -> Any:
    module = Regression(adam)
    limits = {"max_steps": 5} if save_to else {"max_epochs": 2}
    trainer = tiny_trainer(callbacks=[WeightAveraging()], strategy=strategy, devices=2, **limits)
    trainer.fit(module, loader(8, batch_size=1), ckpt_path=resume_from)
    if save_to:
        return trainer.save_checkpoint(save_to)
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in weights(module).items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_rank_has_the_same_average_also_after_a_resume(strategy: str, tmp_path: Path) -> None:
    module = Regression(adam)
    tiny_trainer(callbacks=[WeightAveraging()], max_epochs=2).fit(module, loader(8))
    straight = run_ranks(averages_on_a_rank, 2, strategy)
    for result in straight:
        assert_same(result, module, 1e-6)
    path = run_ranks(averages_on_a_rank, 2, strategy, save_to=str(tmp_path / "middle.ckpt"))[0]
    for result in run_ranks(averages_on_a_rank, 2, strategy, resume_from=path):
        assert_same(result, straight[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_update_waits_for_no_device() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).cuda()
    average = AveragedWeights(module)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for function in (None, get_ema_multi_avg_fn(DECAY)):
            average.update(module, multi_avg_fn=function)
        average.swap(module)
    finally:
        torch.cuda.set_sync_debug_mode("default")
