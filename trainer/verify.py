"""`verify_resume`: proof, on the user's own code, that a resumed run is the run that was never interrupted.

Trains k steps, saves, trains k more; starts anew from the save and trains those k steps again; then compares every
tensor, random stream, logged number and sample order of the two, and names the first that differs.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .callback import Callback
from .checkpoint.inspect import leaves
from .checkpoint.run_state import collect
from .rng import isolated, seed_generators

if TYPE_CHECKING:
    from .module import Module
    from .trainer import Trainer

VARIABLE = "PACELINE_VERIFY_RESUME"
"""The number of steps, perhaps with `:FILE` for the verdict: `fit` then verifies instead, and ends the program."""

_NOISE = ("time", "callbacks", "hyper_parameters", "paceline_version")


@dataclass(frozen=True)
class Verified:
    """What `verify_resume` found: `different` names what differs, in the order in which a run makes it; empty if exact.

    `compared` counts the tensors, streams, numbers and batches that were compared.
    """

    steps: int
    compared: int
    different: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Nothing differs."""
        return not self.different

    def __str__(self) -> str:
        if self.exact:
            return f"Resuming is exact: {self.compared} values are equal to the bit after {self.steps} resumed steps."
        more = f" (and {len(self.different) - 1} more)" if len(self.different) > 1 else ""
        return (
            f"Resuming is not exact: the first to differ is {self.different[0]}{more}. Usual causes: state of a "
            "callback or data set that no state_dict() holds, random numbers from a generator of your own, or "
            "operations that are not deterministic (Trainer(deterministic=True))."
        )


class _Watch(Callback):
    """Saves at step k, and notes the batches, the numbers and the state of the k steps after it."""

    acts_on_metrics = True

    def __init__(self, steps: int, folder: str | None) -> None:
        self.steps = steps
        self.folder = folder
        self.path = ""
        self.batches: list[str] = []
        self.points: list[tuple[int, str]] = []
        self.state: dict[str, str] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= self.steps:
            self.batches.append(digest(batch))

    def on_log(self, trainer: Trainer, pl_module: Module, metrics: dict[str, float], step: int) -> None:
        if step > self.steps:
            self.points.append((step, repr(sorted(metrics.items()))))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.folder is not None and not self.path and trainer.global_step == self.steps:
            self.path = trainer.save_checkpoint(f"{self.folder}/verify.ckpt")
        if not self.state and trainer.global_step == 2 * self.steps:
            self.state = dict(_state(trainer))


def verify_resume(
    trainer: Trainer,
    model: Module,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: Any = None,
    steps: int = 3,
) -> Verified:
    """Train 2 x `steps` steps with a save in the middle, then the second half again from the save, and compare.

    `model` and what was given are copied first and stay as they are. Nothing is logged or saved but in a temporary
    folder. Raises ConfigurationError if the run is too short for so many steps.
    """
    if steps < 1:
        raise ConfigurationError(f"verify_resume(steps={steps!r}): expected at least 1.")
    data = {"train_dataloaders": train_dataloaders, "val_dataloaders": val_dataloaders, "datamodule": datamodule}
    strategies = [copy.deepcopy(trainer.given.get("strategy", "auto")) for _ in range(2)]
    trainer.connect()
    with tempfile.TemporaryDirectory(prefix="paceline-verify-") as own, isolated():
        whole, resumed = _Watch(steps, str(trainer.strategy.broadcast_object(own))), _Watch(steps, None)
        first = _run(trainer, strategies[0], model, data, whole, None)
        if not whole.path or not whole.state:
            raise ConfigurationError(
                f"verify_resume(steps={steps}) trains {2 * steps} steps, but the run ended after {first.global_step}. "
                "Give fewer steps, or a Trainer that trains more."
            )
        seed_generators(1)  # the second half must find its streams in the checkpoint
        _run(trainer, strategies[1], model, data, resumed, whole.path)
        trainer.strategy.barrier()  # rank 0 removes the folder
    return _compare(steps, whole, resumed)


def _run(
    trainer: Trainer, strategy: Any, model: Module, data: Mapping[str, Any], watch: _Watch, path: str | None
) -> Trainer:
    """One of the two runs, of copies, by a trainer like `trainer` without its outputs."""
    callbacks = [copy.deepcopy(callback) for callback in trainer.callbacks_without_output()]
    given = {**trainer.given, "callbacks": callbacks, "logger": False, "enable_checkpointing": False}
    given |= {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    given |= {"max_steps": 2 * watch.steps, "max_time": None, "fast_dev_run": False, "strategy": strategy}
    anew = type(trainer)(**given)
    anew.set_callbacks([*anew.callbacks, watch])
    module = _copied(model)
    anew.fit(module, **{name: _copied(item) for name, item in data.items()}, ckpt_path=path)
    return anew


def _copied(item: Any) -> Any:
    """A deep copy, but not of a trainer that the item knows."""
    known = getattr(item, "__dict__", {})
    held = {name: known[name] for name in ("trainer", "_trainer") if name in known}
    for name in held:
        known[name] = None
    try:
        return copy.deepcopy(item)
    finally:
        known.update(held)


def _state(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Everything that a checkpoint would hold, by name → digest."""
    parts = [(key, value) for key, value in collect(trainer, weights_only=False).items() if key not in _NOISE]
    parts += [(f"callbacks.{type(callback).__name__}", callback.state_dict()) for callback in trainer.callbacks]
    for name, value in parts:
        yield from ((place, digest(leaf)) for place, leaf in leaves(value, name))


def digest(value: Any) -> str:
    """A hash of all bits in a batch or a tensor."""
    found = hashlib.blake2s(digest_size=8)
    for part in _bits(value):
        found.update(part)
    return found.hexdigest()


def _bits(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        value = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _bits(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _bits(item)
    else:
        yield repr(value).encode()


def _compare(steps: int, whole: _Watch, resumed: _Watch) -> Verified:
    pairs = [(f"batch {i} after the save", *pair) for i, pair in enumerate(zip(whole.batches, resumed.batches))]  # noqa: B905
    pairs += [(f"the logged point of step {a[0]}", repr(a), repr(b)) for a, b in zip(whole.points, resumed.points)]  # noqa: B905
    names = list(dict.fromkeys([*whole.state, *resumed.state]))
    pairs += [(name, whole.state.get(name, ""), resumed.state.get(name, "")) for name in names]
    different = [name for name, one, other in pairs if one != other]
    for what, left, right in (("batches", whole.batches, resumed.batches), ("points", whole.points, resumed.points)):
        if len(left) != len(right):
            different.append(f"the number of {what}: {len(left)} and, resumed, {len(right)}")
    return Verified(steps, len(pairs), tuple(different))


def verify_instead(trainer: Trainer, model: Module, data: Mapping[str, Any], steps: str) -> None:
    """What `fit` does under `paceline verify-resume`: verify, print, and end the program with 0 or 1."""
    count, _, told_to = steps.partition(":")
    result = verify_resume(trainer, model, **data, steps=int(count))
    if trainer.is_global_zero:
        print(result, flush=True)
        if told_to:
            Path(told_to).write_text(str(result), encoding="utf-8")
    raise SystemExit(0 if result.exact else 1)
