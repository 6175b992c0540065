"""Windows of several micro-batches on one process: the gradient is that of one big batch, however it was cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import paceline as pl
from paceline.errors import ConfigurationError

from helpers.tiny import Regression, adam, assert_same, by_hand, global_batches, loader, numbers, tiny_trainer


class Counts(pl.Callback):
    """How often each hook of a window ran."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("batch", "zero_grad", "backward", "step"), 0)

    def on_train_batch_end(self, *args: Any) -> None:
        self.counts["batch"] += 1

    def on_before_zero_grad(self, *args: Any) -> None:
        self.counts["zero_grad"] += 1

    def on_before_backward(self, *args: Any) -> None:
        self.counts["backward"] += 1

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.counts["step"] += 1


@pytest.mark.parametrize("accumulate", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("count", [16, 17])
def test_accumulation_gives_the_weights_of_one_big_batch(accumulate: int, count: int) -> None:
    """The last window is short, and so may its last micro-batch be: both are weighted by their samples."""
    module, counts = Regression(adam), Counts()
    trainer = tiny_trainer(accumulate_grad_batches=accumulate, max_epochs=2, callbacks=counts)
    trainer.fit(module, loader(count))
    assert_same(module, by_hand(global_batches(count, 2 * accumulate) * 2, adam), 1e-6)
    windows = 2 * -(-count // (2 * accumulate))
    batches = 2 * -(-count // 2)
    assert trainer.global_step == windows
    assert counts.counts == {"batch": batches, "zero_grad": windows, "backward": batches, "step": windows}


def test_windows_never_cross_an_epoch() -> None:
    trainer = tiny_trainer(accumulate_grad_batches=4, max_epochs=3)
    trainer.fit(Regression(), loader(10))  # 5 batches: windows of 4 and 1
    assert trainer.global_step == 6


def test_drop_last_drops_the_short_window() -> None:
    module = Regression()
    trainer = tiny_trainer(accumulate_grad_batches=2)
    trainer.fit(module, loader(15, drop_last=True))
    assert_same(module, by_hand(global_batches(12, 4)), 1e-6)
    assert trainer.num_training_batches == 6


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100])
def test_a_global_batch_size_derives_the_accumulation(size: int) -> None:
    module, counts = Regression(adam), Counts()
    trainer = tiny_trainer(global_batch_size=size, callbacks=counts)
    trainer.fit(module, loader(17, batch_size=2))
    assert_same(module, by_hand(global_batches(17, size), adam), 1e-6)
    assert trainer.global_step == -(-17 // size)


def test_unequal_parts_of_a_global_batch_are_told_with_the_nearest_even_values() -> None:
    message = r"global_batch_size=5 on 1 rank with batch_size=2 makes unequal micro-batches of 2 and 1 .* are 4 and 6"
    with pytest.warns(UserWarning, match=message):
        tiny_trainer(global_batch_size=5).fit(Regression(), loader(10, batch_size=2))


def test_streams_are_accumulated_and_weighted_by_their_batch_sizes() -> None:
    module = Regression(adam)
    inputs, targets = (torch.cat(parts) for parts in zip(*global_batches(12, 2), strict=True))
    cuts = (3, 1, 4, 2, 2)
    data = list(zip(inputs.split(cuts), targets.split(cuts), strict=True))
    tiny_trainer(accumulate_grad_batches=2).fit(module, data)
    whole = [torch.arange(0, 4), torch.arange(4, 10), torch.arange(10, 12)]
    assert_same(module, by_hand([(inputs[i], targets[i]) for i in whole], adam), 1e-6)


def test_a_batch_without_a_size_cannot_be_accumulated_unweighted() -> None:
    class Own(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer.weight.sum() * batch.scale

    class Batch:
        scale = 1.0

    with pytest.raises(
        ConfigurationError, match=r"A batch of type Batch has no size.*Define loss_weight\(self, batch\)"
    ):
        tiny_trainer(accumulate_grad_batches=2).fit(Own(), [Batch(), Batch()])


def test_the_logged_loss_is_the_loss_of_the_big_batch() -> None:
    class Logs(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss)
            return loss

    trainer = tiny_trainer(accumulate_grad_batches=3)
    trainer.fit(Logs(), loader(5))
    assert float(trainer.callback_metrics["loss"]) == pytest.approx(float(Regression().loss(global_batches(5, 5)[0])))


def test_the_accumulation_may_change_between_epochs() -> None:
    class Changes(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.accumulate_grad_batches = trainer.current_epoch + 1

    module = Regression()
    trainer = tiny_trainer(max_epochs=3, callbacks=Changes())
    trainer.fit(module, loader(12))
    batches = [*global_batches(12, 2), *global_batches(12, 4), *global_batches(12, 6)]
    assert_same(module, by_hand(batches), 1e-6)
    assert trainer.global_step == 6 + 3 + 2


def test_a_limit_may_cut_a_window_short() -> None:
    module = Regression()
    tiny_trainer(accumulate_grad_batches=3, limit_train_batches=4).fit(module, loader(20))
    first = global_batches(6, 6)
    rest = [tuple(part[6:8] for part in global_batches(8, 8)[0])]
    assert_same(module, by_hand([*first, *rest]), 1e-6)


def test_num_training_batches_counts_micro_batches() -> None:
    trainer = tiny_trainer(accumulate_grad_batches=4, limit_train_batches=7)
    trainer.fit(Regression(), loader(40))
    assert trainer.num_training_batches == 7
    assert trainer.global_step == 2


def test_gradients_stay_after_the_last_window_until_the_next_one_begins() -> None:
    class Looks(Regression):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.kept = self.layer.weight.grad is not None

    module = Looks()
    tiny_trainer(accumulate_grad_batches=2).fit(module, loader(4))
    assert module.kept


class LooksBack(Regression):
    """Whether the window before left a gradient that the forward pass, and who clears it, can see."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step and batch_idx % 2 == 0:
            self.in_forward = self.layer.weight.grad is not None
        return super().training_step(batch, batch_idx)


class LooksBeforeClearing(LooksBack):
    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        self.before_clearing = self.layer.weight.grad is not None


def test_the_forward_pass_does_without_the_gradients_of_the_window_before_unless_a_hook_wants_them() -> None:
    alone, watched = LooksBack(), LooksBeforeClearing()
    for module in (alone, watched):
        tiny_trainer(accumulate_grad_batches=2).fit(module, loader(12))
    assert not alone.in_forward
    assert watched.in_forward
    assert watched.before_clearing


def test_accumulating_numbers_of_a_batch_sampler_deals_its_batches_whole() -> None:
    class Sizes(Regression):
        seen: tuple[int, ...] = ()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen += (len(batch),)
            return self.layer.weight.sum() * 0.0

    data = torch.utils.data.DataLoader(numbers(7).dataset, batch_sampler=[[0, 1, 2], [3], [4, 5], [6]])
    module = Sizes()
    trainer = tiny_trainer(accumulate_grad_batches=3)
    trainer.fit(module, data)
    assert module.seen == (3, 1, 2, 1)
    assert trainer.global_step == 2
