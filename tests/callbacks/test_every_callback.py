"""What holds for every callback: its state survives, misspelt hooks are refused, ranks agree, and only rank 0 writes.

A callback that is public has to be in `CASES`; one that changes the weights on purpose says so there.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paceline.callbacks as pc
from paceline.errors import ConfigurationError

from helpers.ranks import run_ranks
from helpers.tiny import Regression, adam, assert_same, loader, tiny_trainer, weights


@dataclass(frozen=True)
class Case:
    """How to make a callback. `changes`: other weights are its purpose; `prints`: so is what rank 0 prints."""

    make: Callable[[], pc.Callback]
    changes: bool = False
    prints: bool = False
    slow: bool = False


class Finetuning(pc.BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


class Writer(pc.PredictionWriter):
    def write_on_batch_end(self, *_: Any) -> None:
        pass


class LogNothing(pc.Logger):
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass


CASES: dict[str, Case] = {
    "BackboneFinetuning": Case(lambda: pc.BackboneFinetuning(1), changes=True),
    "BaseFinetuning": Case(Finetuning, changes=True),
    "BasePredictionWriter": Case(Writer),
    "CSVLogger": Case(lambda: pc.CSVLogger("csv")),
    "Callback": Case(pc.Callback),
    "DeviceStatsMonitor": Case(pc.DeviceStatsMonitor),
    "EMAWeightAveraging": Case(lambda: pc.EMAWeightAveraging(decay=0.5), changes=True),
    "EarlyStopping": Case(lambda: pc.EarlyStopping("val_loss", patience=100)),
    "GradientAccumulationScheduler": Case(lambda: pc.GradientAccumulationScheduler({1: 2}), changes=True),
    "JSONLLogger": Case(lambda: pc.JSONLLogger("jsonl")),
    "LambdaCallback": Case(lambda: pc.LambdaCallback(on_train_epoch_end=lambda trainer, module: None)),
    "LearningRateMonitor": Case(pc.LearningRateMonitor),
    "Logger": Case(LogNothing),
    "ModelCheckpoint": Case(lambda: pc.ModelCheckpoint("checkpoints", monitor="val_loss", save_top_k=2)),
    "ModelSummary": Case(pc.ModelSummary, prints=True),
    "OnExceptionCheckpoint": Case(lambda: pc.OnExceptionCheckpoint("checkpoints")),
    "PredictionWriter": Case(Writer),
    "Profiler": Case(pc.Profiler, prints=True),
    "ProgressBar": Case(pc.ProgressBar, prints=True),
    "RichProgressBar": Case(pc.RichProgressBar, prints=True),
    "StochasticWeightAveraging": Case(lambda: pc.StochasticWeightAveraging(0.05, 2), changes=True),
    "TQDMProgressBar": Case(pc.TQDMProgressBar, prints=True),
    "TensorBoardLogger": Case(lambda: pc.TensorBoardLogger("tensorboard"), slow=True),
    "ThroughputMonitor": Case(pc.ThroughputMonitor),
    "Timer": Case(lambda: pc.Timer("01:00:00:00")),
    "WandbLogger": Case(lambda: pc.WandbLogger(save_dir="wandb", offline=True), slow=True),
    "WeightAveraging": Case(pc.WeightAveraging, changes=True),
}
QUICK = [name for name, case in CASES.items() if not case.slow]
EPOCHS = 3


class Net(Regression):
    """Logs, validates, has a backbone, and draws random numbers in training."""

    def __init__(self) -> None:
        super().__init__(adam)
        torch.manual_seed(21)
        self.backbone = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2))

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(self.backbone(inputs))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


class Watching(pc.Logger):
    """A logger, which some callbacks need, that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.points.append((step or 0, dict(metrics)))


def run(callbacks: list[pc.Callback], ckpt_path: str | None = None, **arguments: Any) -> tuple[Net, Any]:
    """Three epochs of four updates, validated in the middle and at the end of each."""
    limits = {"max_epochs": EPOCHS, "val_check_interval": 2, "log_every_n_steps": 2, **arguments}
    trainer = tiny_trainer(
        callbacks=callbacks,
        logger=Watching(),
        enable_progress_bar=any(isinstance(callback, pc.ProgressBar) for callback in callbacks),
        enable_checkpointing=any(isinstance(callback, pc.ModelCheckpoint) for callback in callbacks),
        **limits,
    )
    module = Net()
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer.fit(module, loader(8, shuffle=True), loader(4), ckpt_path=ckpt_path)
    return module, trainer


OF_ONE_RUN = {"time_elapsed", "version", "run_dir"}


def plain(value: Any) -> Any:
    """A state to compare with ==: tensors as lists, without what no two runs share."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in OF_ONE_RUN}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return "nan" if isinstance(value, float) and math.isnan(value) else value


def test_every_public_callback_is_tried_here() -> None:
    assert set(CASES) == set(pc.__all__)
    assert all(isinstance(case.make(), getattr(pc, name)) for name, case in CASES.items())


# --- state -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CASES)
def test_state_survives_a_round_trip_before_a_run(name: str) -> None:
    first, second = CASES[name].make(), CASES[name].make()
    state = first.state_dict()
    second.load_state_dict(state)
    assert plain(second.state_dict()) == plain(state)
    assert isinstance(first.state_key, str)
    assert first.state_key == second.state_key


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("steps", [3, 8])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(name: str, steps: int) -> None:
    straight_callback, first_callback, second_callback = (CASES[name].make() for _ in range(3))
    straight, _ = run([straight_callback])
    _, trainer = run([first_callback], max_steps=steps)
    path = trainer.save_checkpoint("middle.ckpt")
    saved = plain(first_callback.state_dict())
    loaded: list[Any] = []
    note = pc.LambdaCallback(on_fit_start=lambda trainer, module: loaded.append(plain(second_callback.state_dict())))
    resumed, _ = run([note, second_callback], ckpt_path=path)
    assert loaded == [saved]
    assert_same(resumed, straight)


# --- hooks -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("misspelt", "hook"),
    [("on_train_epoch_ends", "on_train_epoch_end"), ("on_validaton_end", "on_validation_end")],
)
def test_a_misspelt_hook_is_refused_with_the_right_one(name: str, misspelt: str, hook: str) -> None:
    callback = CASES[name].make()
    # The class changes after the object was made, so that each needs no arguments of its own.
    callback.__class__ = type("Misspelt", (type(callback),), {misspelt: lambda self, *_: None})
    with pytest.raises(ConfigurationError, match=rf"{misspelt}.*Did you mean {hook}\b"):
        run([callback])


@pytest.mark.parametrize("name", CASES)
def test_hooks_have_the_arguments_of_the_base(name: str) -> None:
    """Positional, in the same order: that is how they are called."""

    def positional(function: Any) -> list[str]:
        return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    kind = getattr(pc, name)
    for hook in (hook for hook in dir(pc.Callback) if hook.startswith("on_") or hook in ("setup", "teardown")):
        assert positional(getattr(kind, hook)) == positional(getattr(pc.Callback, hook)), hook


# --- what it leaves alone ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name in QUICK if not CASES[name].changes])
def test_the_weights_are_those_of_a_run_without_it(name: str) -> None:
    with_it, _ = run([CASES[name].make()])
    without, _ = run([])
    assert_same(with_it, without)


@pytest.mark.parametrize("name", [name for name in QUICK if CASES[name].changes])
def test_those_that_change_the_weights_do(name: str) -> None:
    with_it, _ = run([CASES[name].make()])
    without, _ = run([])
    assert not torch.equal(with_it.layer.weight, without.layer.weight)


def test_all_that_change_nothing_go_together() -> None:
    alone = {"ProgressBar", "RichProgressBar", "BasePredictionWriter"}  # one bar is enough
    callbacks = [CASES[name].make() for name in QUICK if not CASES[name].changes and name not in alone]
    together, _ = run(callbacks)
    without, _ = run([])
    assert_same(together, without)


# --- ranks -------------------------------------------------------------------------------------------------------
def runs_on_a_rank(names: list[str], folder: str) -> dict[str, Any]:
    """What each callback's run left: weights, points and files that this rank wrote, and what it printed."""
    results = {}
    for name in names:
        os.makedirs(own := os.path.join(folder, name, os.environ["RANK"]))
        os.chdir(own)
        print(f"<{name}>", flush=True)
        module, trainer = run([CASES[name].make()], strategy="ddp", devices=2)
        print("<end>", flush=True)
        files = [os.path.join(base, file) for base, _, found in os.walk(".") for file in found]
        results[name] = {"weights": weights(module), "steps": trainer.global_step, "files": files}
        os.chdir(folder)
        trainer.strategy.barrier()
    return results


def test_two_ranks_agree_and_only_rank_zero_writes_and_prints(tmp_path: Path) -> None:
    found = run_ranks(runs_on_a_rank, 2, QUICK, str(tmp_path), timeout_seconds=120)
    first, second = found
    printed = [dict(zip(QUICK, parts_of(output), strict=True)) for output in found.outputs]
    for name in QUICK:
        assert_same(first[name]["weights"], second[name]["weights"])
        assert first[name]["steps"] == second[name]["steps"]
        assert second[name]["files"] == [], name
        assert printed[1][name] == "", name
        assert ("paceline: DDP" in printed[0][name]) and (printed[0][name].count("\n") > 1) == CASES[name].prints, name
    for name in ("CSVLogger", "JSONLLogger", "ModelCheckpoint"):
        assert first[name]["files"], name


def parts_of(output: str) -> list[str]:
    return [part.partition(">\n")[2] for part in output.split("<end>\n")[:-1]]
