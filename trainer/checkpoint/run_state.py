"""The state of a run as one dict, and back: what a checkpoint holds beside its files.

`collect` makes the dict on every rank, with Lightning's keys and ours under "paceline", and lets the hooks edit it;
`restore_weights` and `restore_progress` take it back, before and after the optimizers exist.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...errors import CheckpointError
from ..hooks import overridden
from ..module import Module
from ..rng import random_state, restore_random_state
from ..state import Progress
from ..switches import changed_since
from .boxes import is_sharded
from .load import load
from .optimizer import load_optimizer_state_by_name, optimizer_state_by_name
from .save import Prepared, prepare
from .saver import FollowUp
from .sharded import ShardedCheckpoint

if TYPE_CHECKING:
    from ..trainer import Trainer


def save_checkpoint(
    trainer: Trainer, path: str | os.PathLike[str], weights_only: bool, wait: bool, follow_up: FollowUp
) -> str:
    """Save on rank 0; CheckpointError on every rank. Returns the path that it got, or without `wait` is to get."""
    trainer.saver.settle()
    checkpoint = collect(trainer, weights_only)
    prepared: Prepared | None = None
    refusal: CheckpointError | None = None
    if trainer.is_global_zero or trainer.strategy.sharded:
        try:
            prepared = prepare(
                model=checkpoint.pop("state_dict"),
                optimizer=checkpoint.pop("optimizer_states", None),
                state=checkpoint,
                meta={
                    "global_step": trainer.global_step,
                    "epoch": trainer.current_epoch,
                    "world_size": trainer.world_size,
                    "weights_only": weights_only,
                    "run": trainer.run_id,
                },
                rank=trainer.global_rank,
            )
        except CheckpointError as error:
            refusal = error
    for told in trainer.strategy.all_gather_object(refusal):
        if told is not None:
            raise told
    trainer.saver.start(os.fspath(path), prepared, follow_up, wait)
    outcome = trainer.saver.settle() if wait else None
    return os.fspath(path) if outcome is None else outcome.path


def reserve_memory(trainer: Trainer, weights_only: bool) -> None:
    """Begin to take the host memory that the first asynchronous save copies into; later ones use it again."""
    if not (trainer.is_global_zero or trainer.strategy.sharded):
        return
    module = trainer.lightning_module
    held = [*module.parameters(), *module.buffers()]
    for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
        averages = 0 if weights_only else len(group.get("betas", ())) or bool(group.get("momentum"))
        held += averages * group["params"]
    local = [tensor.to_local() if is_sharded(tensor) else tensor for tensor in held]
    trainer.saver.reserve([(tensor.nbytes, tensor.is_cuda) for tensor in local])


def collect(trainer: Trainer, weights_only: bool) -> dict[str, Any]:
    """The run's state, with the edits of every `on_save_checkpoint`; a collective."""
    module, strategy = trainer.lightning_module, trainer.strategy
    checkpoint: dict[str, Any] = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "paceline_version": __version__,
        "state_dict": module.state_dict(),
        "hyper_parameters": module._hparams_to_store(),
        "hparams_name": module._hparams_name,
        "hparams_init_names": list(module._hparams_init_names),
    }
    if not weights_only:
        names = dict(module.named_parameters())
        checkpoint["optimizer_states"] = [optimizer_state_by_name(o, names) for o in trainer.optimizers]
        checkpoint["lr_schedulers"] = [
            config.scheduler.state_dict() if hasattr(config.scheduler, "state_dict") else None
            for config in trainer.lr_scheduler_configs
        ]
        checkpoint["loops"] = dataclasses.asdict(trainer.progress)
        checkpoint["callbacks"] = {
            callback.state_key: state for callback in trainer.callbacks if (state := callback.state_dict())
        }
        checkpoint["paceline"] = {
            "seed": trainer.seed,
            "data": trainer.train_data.facts() if trainer.train_data is not None else None,
            "ranks": strategy.all_gather_object(_of_rank(trainer)),
            "scaler": strategy.scaler.state_dict() if strategy.scaler is not None else None,
            "schedulers": _kinds(trainer),
            "gradients": _gradients(module),
            "switches": changed_since(trainer.switches_at_start, module),
        }
        if trainer.datamodule is not None:
            checkpoint["datamodule_hyper_parameters"] = trainer.datamodule._hparams_to_store()
            checkpoint["datamodule_hparams_name"] = trainer.datamodule._hparams_name
            if state := trainer.datamodule.state_dict():
                checkpoint[type(trainer.datamodule).__qualname__] = state
    for callback in trainer.callbacks:
        if not weights_only or getattr(callback, "changes_saved_weights", False):
            callback.on_save_checkpoint(trainer, module, checkpoint)
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def _gradients(module: Module) -> dict[str, Any]:
    """The gradients by the name of their parameter, where the next window does not begin without any."""
    if module.automatic_optimization and not overridden(module, "optimizer_zero_grad", Module):
        return {}
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@dataclasses.dataclass
class BeforeValidation:
    """What a save inside a validation needs of the moment before it, where a resumed run begins it again."""

    random: dict[str, Any]
    idle_metrics: list[str]

    @staticmethod
    def now(module: Module) -> BeforeValidation:
        """The random streams, and the metric objects that nobody has fed: those of validation."""
        idle = [path for path, metric in module.named_modules() if getattr(metric, "_update_count", 1) == 0]
        return BeforeValidation(random_state(), idle)


def _of_rank(trainer: Trainer) -> dict[str, Any]:
    """What every rank has of its own."""
    progress = trainer.progress
    state: dict[str, Any] = {"random": random_state(), "metrics": trainer.metrics.state_dict(trainer.lightning_module)}
    if trainer.train_data is not None:
        state["data"] = trainer.train_data.position(progress.epoch, progress.windows_in_epoch)
    before = trainer.before_validation
    if before is not None and trainer.progress.due[:1] == ["validation"]:
        state["random"] = before.random
        for path in before.idle_metrics:
            state["metrics"]["metric_objects"].pop(path, None)
    return state


def read(trainer: Trainer, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dict of the checkpoint at `path`; CheckpointError. What the module has as a shard is read as one."""
    loaded = load(path)
    if trainer.strategy.sharded:
        shards = ShardedCheckpoint(loaded, dict(trainer.strategy.named_state()))
        model, state, optimizer = shards.model(), shards.state(), shards.optimizer()
    else:
        model, state, optimizer = loaded.model, loaded.state, loaded.optimizer
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds no state of a run. Use load_from_checkpoint to read its weights.")
    checkpoint = {"state_dict": model, **state}
    if optimizer is not None:
        checkpoint["optimizer_states"] = optimizer
    return checkpoint


def check_resumable(checkpoint: Mapping[str, Any], path: str) -> None:
    """CheckpointError for a checkpoint of weights alone."""
    if "optimizer_states" not in checkpoint or "paceline" not in checkpoint:
        raise CheckpointError(
            f"{path} holds weights only, so no run can go on from it. Use load_from_checkpoint and start a new one, "
            "or a checkpoint that was saved without weights_only."
        )


def restore_weights(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Weights, and the states of the data module and the callbacks; before the optimizers exist."""
    module = trainer.lightning_module
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    datamodule = trainer.datamodule
    if datamodule is not None and type(datamodule).__qualname__ in checkpoint:
        datamodule.load_state_dict(checkpoint[type(datamodule).__qualname__])
    for callback in trainer.callbacks:
        callback.on_load_checkpoint(trainer, module, checkpoint)
    if trainer.state.fn == "fit":
        states = checkpoint.get("callbacks", {})
        for callback in trainer.callbacks:
            if callback.state_key in states:
                callback.load_state_dict(states[callback.state_key])


def restore_progress(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """The counters; before the hooks that read them."""
    progress = trainer.progress
    vars(progress).update(vars(Progress(**checkpoint["loops"])))  # the validation that is set up has it already
    if progress.due == ["next_epoch"]:
        progress.end_epoch()
    assert trainer.train_data is not None
    trainer.train_data.set_epoch(progress.epoch)
    states = checkpoint["paceline"]["ranks"]
    length = trainer.train_data.num_batches
    done = min(progress.windows_in_epoch * trainer.train_data.micro_batches, length)  # in whole windows
    if length == math.inf and len(states) == trainer.world_size:
        done = min(done, progress.batches_in_epoch)  # a stream's last window may have been a short one
    progress.batches_in_epoch = int(done)
    if len(states) == trainer.world_size:
        trainer.train_data.find(states[trainer.global_rank].get("data"))


def restore_optimizers(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Optimizers, schedulers and scaler; after `on_fit_start`, where callbacks add the groups that they had added."""
    _check_alike("number of optimizers", len(checkpoint["optimizer_states"]), len(trainer.optimizers))
    names = dict(trainer.lightning_module.named_parameters())
    for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
        load_optimizer_state_by_name(optimizer, state, names)
        if trainer.global_step:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # else torch warns: it stepped elsewhere
    _check_alike("learning-rate schedulers", checkpoint["paceline"]["schedulers"], _kinds(trainer))
    for config, state in zip(trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True):
        if state is not None:
            config.scheduler.load_state_dict(_like(config.scheduler.state_dict(), state))
    if trainer.strategy.scaler is not None and checkpoint["paceline"]["scaler"] is not None:
        trainer.strategy.scaler.load_state_dict(checkpoint["paceline"]["scaler"])


def _like(now: Any, saved: Any) -> Any:
    """`saved` with the dict subclasses that `now` has, such as MultiStepLR's Counter: checkpoints hold plain dicts."""
    if isinstance(now, dict) and isinstance(saved, dict):
        items = {key: _like(now.get(key), item) for key, item in saved.items()}
        return type(now)(items) if isinstance(now, Counter) else items
    if isinstance(now, list) and isinstance(saved, list):
        return [_like(*pair) for pair in zip(now, saved, strict=False)] + saved[len(now) :]
    return saved


def _kinds(trainer: Trainer) -> list[str]:
    """The classes of the schedulers: the state of one kind would be taken by another without a word."""
    return [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]


def _check_alike(what: str, saved: Any, now: Any) -> None:
    if saved != now:
        raise CheckpointError(
            f"The {what} of the checkpoint: {saved}, what configure_optimizers gives now: {now}. Configure the same, "
            "or start from the weights alone."
        )


def restore_gradients(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Those that the user's own accumulation has not used yet; after all that clears gradients."""
    gradients = checkpoint["paceline"].get("gradients", {})
    for name, parameter in trainer.lightning_module.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter.device)


def restore_metrics(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """What was logged in the epoch under way; on another number of ranks, rank 0 takes what all had logged."""
    states, metrics, module = checkpoint["paceline"]["ranks"], trainer.metrics, trainer.lightning_module
    if len(states) == trainer.world_size:
        metrics.load_state_dict(states[trainer.global_rank]["metrics"], module)
        return
    metrics.load_state_dict(states[0]["metrics"], module)
    metrics.merge_epoch([state["metrics"] for state in states[1:]], keep=trainer.is_global_zero)


def restore_randomness(trainer: Trainer, checkpoint: dict[str, Any]) -> bool:
    """This rank's random streams, right before training goes on; False where the number of ranks is another."""
    states = checkpoint["paceline"]["ranks"]
    if len(states) != trainer.world_size:
        return False
    restore_random_state(states[trainer.global_rank]["random"])
    return True
