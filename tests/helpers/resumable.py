"""Runs that are cut and resumed, and what must be equal afterwards: everything.

    whole = run("adam", tmp_path, saves=EVERY_STEP)
    assert run("adam", tmp_path / "again", ckpt_path=path) == whole          # see `same`

A *case* is a module and trainer arguments; `CASES` has one for each thing that has state of its own. All draw random
numbers wherever a run can: in the data set, in training, in validation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset

import paceline as pl
from paceline.callbacks import Callback, EarlyStopping, ModelCheckpoint
from paceline.trainer.rng import random_state

SAMPLES = 36


class Noisy(Dataset[Any]):
    """Samples with noise that is drawn when they are read, and their indices."""

    def __init__(self, length: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(length, 6, generator=generator)
        self.targets = torch.randint(0, 2, (length,), generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.inputs[index] + 0.1 * torch.randn(6), self.targets[index], index


class Classifier(pl.Module):
    """A small network with dropout and batch statistics; `seen` has the samples of each micro-batch."""

    def __init__(self, optimizers: Callable[[pl.Module], Any]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2))
        self.optimizers_of = optimizers
        self.seen: list[tuple[int, int, list[int]]] = []
        self.windows: list[list[int]] = []
        self._window: list[int] = []

    def loss(self, batch: Any) -> Tensor:
        inputs, targets, _ = batch
        return nn.functional.cross_entropy(self.net(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch_idx, batch[2].tolist()))
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._window += batch[2].tolist()
        if not self.trainer.fit_run.data.plan().locate(batch_idx + 1)[1] or self.trainer.is_last_batch:
            self.windows.append(self._window)
            self._window = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch) + 0.01 * torch.rand(()))

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)


class TwoPlayers(Classifier):
    """Manual optimization: two optimizers in turn, each with a scheduler."""

    def __init__(self, optimizers: Callable[[pl.Module], Any]) -> None:
        super().__init__(optimizers)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append((self.current_epoch, batch_idx, batch[2].tolist()))
        turn = batch_idx % 2
        optimizer = self.optimizers()[turn]
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers()[turn].step()
        self.log("train_loss", loss, on_step=True, on_epoch=True)


class AccumulatesByHand(TwoPlayers):
    """Manual optimization that steps after every second batch, whatever the epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append((self.current_epoch, batch_idx, batch[2].tolist()))
        loss = self.loss(batch)
        self.manual_backward(loss)
        if self.trainer.progress.total_batches % 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
        self.log("train_loss", loss, on_step=True, on_epoch=True)


class Switches(Classifier):
    """Hooks freeze layers, change their modes, and count the validations and the ends of training."""

    def __init__(self, optimizers: Callable[[pl.Module], Any]) -> None:
        super().__init__(optimizers)
        self.register_buffer("counted", torch.zeros(2))

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch != 1)
        self.net[3].train(self.current_epoch == 1)

    def on_validation_epoch_end(self) -> None:
        self.counted[0] += 1

    def on_train_end(self) -> None:
        self.counted[1] += 1


class FromTwo(Classifier):
    """Batches of two loaders of different lengths, as `CombinedLoader` puts them together, are one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = [part for part in batch.values() if part is not None] if isinstance(batch, dict) else [batch]
        return super().training_step(tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)), batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass


def _adam(module: pl.Module) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def _sgd_by_step(module: pl.Module) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=40)
    return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 2}]


def _adam_by_epoch(module: pl.Module) -> Any:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05, amsgrad=True)
    return [optimizer], [lr_scheduler.ExponentialLR(optimizer, 0.5)]


def _milestones(module: pl.Module) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.MultiStepLR(optimizer, [2, 5, 5], 0.5)]
    return [optimizer], [{"scheduler": lr_scheduler.SequentialLR(optimizer, parts, [4]), "interval": "step"}]


def _two(module: pl.Module) -> Any:
    parameters = list(module.parameters())
    pair = torch.optim.Adam(parameters[:4], lr=0.02), torch.optim.SGD(parameters[4:], lr=0.1, momentum=0.9)
    return list(pair), [lr_scheduler.StepLR(one, 3, 0.5) for one in pair]


@dataclass
class Case:
    """What to train and how."""

    optimizers: Callable[[pl.Module], Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Callback]] = list
    module: type[Classifier] = Classifier
    combined: str = ""


def _averaged() -> list[Callback]:
    from paceline.callbacks import WeightAveraging

    return [WeightAveraging()]


CASES = {
    "adam_plateau_accumulated": Case(_adam, {"accumulate_grad_batches": 2, "val_check_interval": 3}),
    "sgd_momentum_by_step": Case(_sgd_by_step, {"gradient_clip_val": 0.5}),
    "adam_by_epoch": Case(_adam_by_epoch, {"accumulate_grad_batches": 3}),
    "fp16": Case(_sgd_by_step, {"precision": "16-mixed"}),
    "early_stopping": Case(_adam, {"max_epochs": 9}, lambda: [EarlyStopping("val_loss", patience=1, min_delta=0.01)]),
    "manual": Case(_two, {}, module=TwoPlayers),
    "manual_accumulated": Case(_two, {}, module=AccumulatesByHand),
    "switched": Case(_milestones, {"max_steps": 14, "val_check_interval": 3}, module=Switches),
    "averaged": Case(_adam_by_epoch, {}, _averaged),
    "min_size": Case(_adam_by_epoch, {"accumulate_grad_batches": 2}, module=FromTwo, combined="min_size"),
    "max_size": Case(_adam_by_epoch, module=FromTwo, combined="max_size"),
    "max_size_cycle": Case(_adam_by_epoch, module=FromTwo, combined="max_size_cycle"),
    "sequential": Case(_adam_by_epoch, {"accumulate_grad_batches": 3}, module=FromTwo, combined="sequential"),
}


@dataclass
class Outcome:
    """What a run left on this rank: digests by name, what it read, what it logged, where it was saved."""

    digests: dict[str, str]
    metrics: dict[str, float]
    epochs: int
    step: int
    seen: list[tuple[int, int, list[int]]]
    points: list[dict[str, Any]]
    saved: list[str]
    windows: list[list[int]]


def run(
    case: str,
    root: Path | str,
    ckpt_path: str | None = None,
    callbacks: tuple[Callback, ...] = (),
    workers: int = 0,
    ranks: int = 1,
    batch_size: int = 4,
    **arguments: Any,
) -> Outcome:
    """Train a case from its beginning, or from `ckpt_path` on, to its end."""
    of_case = CASES[case]
    pl.seed_everything(7, verbose=False)
    module = of_case.module(of_case.optimizers)
    own: dict[str, Any] = {
        "max_epochs": 3,
        "log_every_n_steps": 2,
        "default_root_dir": str(root),
        "accelerator": "cpu",
        "devices": ranks,
        "strategy": "ddp" if ranks > 1 else "single",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    }
    trainer = pl.Trainer(**(own | of_case.arguments | arguments), callbacks=[*of_case.callbacks(), *callbacks])
    train: Any = DataLoader(Noisy(), batch_size, shuffle=True, num_workers=workers)
    if of_case.combined:
        shorter = DataLoader(Noisy(20), batch_size, shuffle=True, num_workers=workers)
        train = pl.CombinedLoader({"long": train, "short": shorter}, of_case.combined)
    trainer.fit(module, train, DataLoader(Noisy(10), 4), ckpt_path=ckpt_path)
    return Outcome(
        digests=_digests(trainer, module),
        metrics={name: float(value) for name, value in sorted(trainer.callback_metrics.items())},
        epochs=trainer.current_epoch,
        step=trainer.global_step,
        seen=module.seen,
        points=read_points(trainer.log_dir),
        saved=[path for callback in callbacks if isinstance(callback, ModelCheckpoint) for path in _paths(callback)],
        windows=module.windows,
    )


def every_save() -> tuple[Callback, ...]:
    """Callbacks that save after every update, after every validation and at every epoch's end, and keep all."""
    return (
        ModelCheckpoint(every_n_train_steps=1, save_top_k=-1),
        ModelCheckpoint(filename="v{step}", monitor="val_loss", save_top_k=-1, save_on_train_epoch_end=False),
        ModelCheckpoint(filename="e{step}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True),
    )


def saved_in(root: Path | str, version: str = "version_0") -> list[str]:
    """All checkpoints of the run in `root`."""
    return sorted(str(path) for path in Path(root).glob(f"{version}/checkpoints/*.ckpt") if path.is_dir())


def same(resumed: Outcome, whole: Outcome) -> None:
    """A resumed run ended as the one that was never interrupted; what it read and logged is the other's end."""
    ended = not resumed.seen and not resumed.points  # the checkpoint of a finished run: nothing was done
    different = [
        name
        for name, value in whole.digests.items()
        if resumed.digests.get(name) != value and not (ended and name == "random")
    ]
    assert not different, f"{different} differ (read: {resumed.seen[:1]} and on)"
    assert resumed.metrics == whole.metrics
    assert (resumed.epochs, resumed.step) == (whole.epochs, whole.step)
    assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :]
    assert resumed.points == whole.points[len(whole.points) - len(resumed.points) :]


def read_points(folder: str | None) -> list[dict[str, Any]]:
    """The points of a run's JSONL file, without their times."""
    file = Path(folder or "", "metrics.jsonl")
    if folder is None or not file.exists():
        return []
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in file.read_text().splitlines()]


def _paths(callback: ModelCheckpoint) -> list[str]:
    return [path for path in callback.saved_paths() if path]


def _digests(trainer: pl.Trainer, module: pl.Module) -> dict[str, str]:
    states: dict[str, Any] = dict(module.state_dict())
    for number, optimizer in enumerate(trainer.optimizers):
        states[f"optimizer {number}"] = optimizer.state_dict()
    for number, config in enumerate(trainer.lr_scheduler_configs):
        states[f"scheduler {number}"] = {k: v for k, v in config.scheduler.state_dict().items() if k != "anneal_func"}
    states["random"] = random_state()
    if trainer.strategy.scaler is not None:
        states["scaler"] = trainer.strategy.scaler.state_dict()
    for callback in trainer.callbacks:
        own = not isinstance(callback, ModelCheckpoint) and "Logger" not in type(callback).__name__
        if own and (state := callback.state_dict()):
            states[type(callback).__name__] = state
    return {name: digest(state) for name, state in states.items()}


def digest(state: Any) -> str:
    """A hash of every bit in a tree."""
    return hashlib.sha256(repr(_plain(state)).encode()).hexdigest()[:16]


def _plain(state: Any) -> Any:
    if isinstance(state, Tensor):
        state = state.detach().cpu().contiguous()
        return str(state.dtype), tuple(state.shape), state.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(state, dict):
        return {key: _plain(item) for key, item in state.items()}
    if isinstance(state, (list, tuple)):
        return [_plain(item) for item in state]
    if hasattr(state, "tobytes"):
        return state.tobytes()
    return state
