"""`StochasticWeightAveraging`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, update_bn

from paceline.callbacks import LambdaCallback, StochasticWeightAveraging
from paceline.errors import ConfigurationError

from helpers.ranks import run_ranks
from helpers.tiny import Regression, assert_same, loader, samples, tiny_trainer, weights


class Net(Regression):
    """BatchNorm, if wanted, and a scheduler of its own, if wanted; its logging shows who calls training_step."""

    def __init__(self, norm: bool = False, scheduled: bool = False) -> None:
        super().__init__(lr=0.05)
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()
        self.body = nn.Sequential(nn.Linear(3, 3, bias=False))
        with torch.no_grad():
            self.body[0].weight.copy_(torch.tensor([[0.5, 0.1, -0.2], [0.3, 0.9, 0.2], [0.1, 0.0, 0.7]]))
        self.scheduled = scheduled
        self.steps = 0

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(self.norm(self.body(inputs)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if not self.scheduled:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Notes(LambdaCallback):
    """Weights and rates as epochs begin."""

    def __init__(self) -> None:
        super().__init__(on_train_epoch_start=self.note)
        self.weights: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def note(self, trainer: Any, module: Any) -> None:
        self.weights.append(weights(module))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def mean_of(dicts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in dicts]).mean(0) for name in dicts[0]}


@pytest.mark.parametrize(("start", "first"), [(2, 1), (1, 0), (0.8, 3), (0.5, 1), (5, 4)])
def test_the_end_is_the_mean_of_the_weights_with_which_epochs_began(start: Any, first: int) -> None:
    module, notes = Net(), Notes()
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=start)
    trainer = tiny_trainer(callbacks=[notes, swa], max_epochs=5)
    trainer.fit(module, loader(8))
    assert (swa.swa_start, swa.swa_end) == (first, 4)
    assert_same(module, mean_of(notes.weights[first:]), 1e-6)
    assert trainer.current_epoch == 5
    assert trainer.global_step == 20


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_the_rates_go_to_those_of_averaging(strategy: Any, scheduled: bool) -> None:
    notes = Notes()
    swa = StochasticWeightAveraging(0.2, 2, annealing_epochs=3, annealing_strategy=strategy)
    trainer = tiny_trainer(callbacks=[notes, swa], max_epochs=6)
    trainer.fit(Net(scheduled=scheduled), loader(8))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05 * (0.5 if scheduled else 1))
    reference, expected = SWALR(optimizer, 0.2, 3, strategy), [0.05, optimizer.param_groups[0]["lr"]]
    for _ in range(4):
        optimizer.step()
        reference.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert notes.rates == pytest.approx(expected)
    assert expected[-1] == pytest.approx(0.2)
    assert isinstance(trainer.lr_scheduler_configs[0].scheduler, SWALR)
    assert len(trainer.lr_scheduler_configs) == 1


def test_batch_norm_is_that_of_the_mean_and_its_pass_leaves_no_trace() -> None:
    module, notes, logged = Net(norm=True), Notes(), []
    note = LambdaCallback(on_log=lambda trainer, module, metrics, step: logged.append((step, sorted(metrics))))
    swa = StochasticWeightAveraging(0.01, 2)
    trainer = tiny_trainer(callbacks=[notes, swa, note], max_epochs=3, log_every_n_steps=1)
    torch.manual_seed(5)
    trainer.fit(module, loader(8))
    assert module.steps == 3 * 4 + 4
    assert trainer.global_step == 12
    assert logged[-1][0] == 12
    assert module.norm.momentum == 0.1
    assert module.training

    reference = Net(norm=True)
    reference.load_state_dict({**module.state_dict(), "norm.running_mean": torch.ones(3)})
    update_bn(iter([batch for batch, _ in loader(8)]), reference)
    torch.testing.assert_close(dict(reference.named_buffers()), dict(module.named_buffers()))


def test_stopped_before_its_end_a_run_keeps_its_own_weights() -> None:
    results = []
    for callbacks in ([StochasticWeightAveraging(0.05, 1)], []):
        module = Net()
        tiny_trainer(callbacks=callbacks, max_epochs=4, max_steps=7).fit(module, loader(8))
        results.append(weights(module))
    assert_same(*results)


@pytest.mark.parametrize("steps", [3, 8, 9, 12, 16])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_resumed_run_is_exact(steps: int, scheduled: bool) -> None:
    def trainer(**limits: Any) -> Any:
        return tiny_trainer(callbacks=[StochasticWeightAveraging(0.2, 3, annealing_epochs=2)], max_epochs=5, **limits)

    straight, resumed = Net(norm=True, scheduled=scheduled), Net(norm=True, scheduled=scheduled)
    trainer().fit(straight, loader(8))
    first = trainer(max_steps=steps)
    first.fit(Net(norm=True, scheduled=scheduled), loader(8))
    path = first.save_checkpoint("middle.ckpt")
    trainer().fit(resumed, loader(8), ckpt_path=path)
    torch.testing.assert_close(dict(resumed.state_dict()), dict(straight.state_dict()), rtol=0, atol=0)


def test_a_run_that_did_not_average_is_gone_on_from_with_a_warning() -> None:
    first = tiny_trainer(max_steps=12, max_epochs=5)
    first.fit(Net(), loader(8))
    path = first.save_checkpoint("plain.ckpt")
    swa = StochasticWeightAveraging(0.2, 2)
    with pytest.warns(UserWarning, match=r"begins in epoch 3, after its start 1"):
        tiny_trainer(callbacks=[swa], max_epochs=5).fit(Net(), loader(8), ckpt_path=path)
    assert swa.state_dict()["n_averaged"] == 2


def test_a_function_of_the_users_own() -> None:
    module, notes = Net(), Notes()
    swa = StochasticWeightAveraging(0.01, 1, avg_fn=lambda averaged, current, count: torch.maximum(averaged, current))
    tiny_trainer(callbacks=[notes, swa], max_epochs=3).fit(module, loader(8))
    assert_same(module, {n: torch.stack([w[n] for w in notes.weights]).amax(0) for n in notes.weights[0]})


def test_a_checkpoint_that_is_saved_after_the_fit_has_the_mean() -> None:
    module = Net()
    trainer = tiny_trainer(callbacks=[StochasticWeightAveraging(0.01, 1)], max_epochs=2)
    trainer.fit(module, loader(8))
    assert_same(Net.load_from_checkpoint(trainer.save_checkpoint("end.ckpt")), module)


@pytest.mark.parametrize(
    "arguments",
    [
        {"swa_lrs": 0},
        {"swa_lrs": -1.0},
        {"swa_lrs": []},
        {"swa_lrs": [0.1, 0]},
        {"swa_lrs": "0.1"},
        {"swa_epoch_start": 0},
        {"swa_epoch_start": 1.5},
        {"swa_epoch_start": -1},
        {"annealing_epochs": -1},
        {"annealing_strategy": "step"},
        {"avg_fn": 3},
    ],
)
def test_wrong_arguments_are_refused(arguments: Any) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        StochasticWeightAveraging(**{"swa_lrs": 0.1, **arguments})


def test_runs_that_it_cannot_average_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_epochs"):
        tiny_trainer(callbacks=[StochasticWeightAveraging(0.1)], max_steps=3).fit(Net(), loader(8))
    with pytest.raises(ConfigurationError, match="2 rates and the optimizer 1"):
        tiny_trainer(callbacks=[StochasticWeightAveraging([0.1, 0.2], 1)]).fit(Net(), loader(8))
    module = Net()
    module.automatic_optimization = False
    with pytest.raises(ConfigurationError, match="manual"):
        tiny_trainer(callbacks=[StochasticWeightAveraging(0.1)]).fit(module, loader(8))


def averages_on_a_rank() -> Any:
    module = Net(norm=True)
    trainer = tiny_trainer(
        callbacks=[StochasticWeightAveraging(0.05, 1)], strategy="ddp", devices=2, max_epochs=2, num_sanity_val_steps=0
    )
    trainer.fit(module, loader(10, batch_size=3))
    return dict(module.state_dict())


def test_batch_norm_knows_the_batches_of_all_ranks() -> None:
    first, second = run_ranks(averages_on_a_rank, 2)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    # Windows of 6 and 4 samples, whatever rank their halves went to.
    batches = [part for window in samples(10).tensors[0].split(6) for part in window.tensor_split(2)]
    assert [len(batch) for batch in batches] == [3, 3, 2, 2]
    reference = Net(norm=True)
    reference.load_state_dict(first)
    update_bn(iter(batches), reference)
    torch.testing.assert_close(dict(reference.named_buffers()), {n: first[n] for n, _ in reference.named_buffers()})
