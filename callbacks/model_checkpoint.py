"""`ModelCheckpoint`: when to save, what to call it, and which of the saved checkpoints to keep.

The hooks say when; all of them end in `_act`, which reads top to bottom: decide, note, save, let go. Decisions come
from metrics that are equal on every rank, so every rank makes the same ones and calls `trainer.save_checkpoint`
together. What is noted is noted before the save, so that a checkpoint knows itself. Nothing is removed before its
successor is whole on the disk: what waits for that is in `_retired`, and in the state, so that a killed run leaves
nothing behind.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigurationError
from ..trainer.agreed_clock import AgreedClock
from ..trainer.argument_types import checked_types
from ..trainer.callback import Callback
from ..trainer.checkpoint import is_checkpoint, read_manifest, remove, resolve_pointer, write_pointer
from ..trainer.checkpoint.run_state import reserve_memory
from ..trainer.checkpoint.saver import FollowUp
from ..trainer.checkpoint.storage import storage_of
from ..trainer.rank_zero import rank_zero_info, rank_zero_warn
from .checkpoint_names import format_name
from .log_file import is_url, join
from .monitored import Watch, never_logged
from .top_k import best, comparable, qualifies, worst

if TYPE_CHECKING:
    from ..trainer.checkpoint.saver import Outcome
    from ..trainer.module import Module
    from ..trainer.trainer import Trainer

#: What is noted of a save before it is made.
_NOTED = [
    "best_model_path",
    "best_model_score",
    "best_k_models",
    "kth_best_model_path",
    "kth_value",
    "current_score",
    "last_model_path",
    "_last_target",
    "_last_checkpoint_saved",
    "_last_global_step_saved",
    "_retired",
    "_runs",
]


class ModelCheckpoint(Callback):
    """Saves into `dirpath` (default: `checkpoints` in the trainer's `log_dir`) and keeps the `save_top_k` best.

    `filename` is a template, `{epoch}-{step}` by default; a name that is taken gets `-v1`, `-v2` ..., never another
    run's checkpoint. `monitor` is a logged metric, `mode` "min" or "max"; without one the newest counts as the best.
    `save_top_k`: -1 keeps all, 0 none. `save_last` saves each time, among the best or not, and keeps
    `last.ckpt`, a pointer to the newest.
    When: every `every_n_epochs` epochs (the default, 1), `every_n_train_steps` updates, or `train_time_interval`;
    epochs are saved after validation where `save_on_train_epoch_end` is False; None finds that from the Trainer.
    With `async_save` training waits only until the state is copied in host memory, and the files are whole some time
    later, at the latest at the next save or the end of `fit`. A save that fails, such as on a full disk, stops training
    with a CheckpointError at the next step that all ranks agree on; `on_save_error="warn"` goes on without it.
    """

    acts_on_metrics = True

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    @checked_types
    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
        async_save: bool = True,
        on_save_error: Literal["raise", "warn"] = "raise",
    ) -> None:
        self.dirpath = None if dirpath is None else _absolute(os.fspath(dirpath))
        self._given_dirpath = self.dirpath
        self.filename = filename
        self.monitor = monitor
        self.verbose = verbose
        self.save_last = save_last
        self.save_top_k = save_top_k
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.auto_insert_metric_name = auto_insert_metric_name
        if every_n_train_steps is None and every_n_epochs is None and train_time_interval is None:
            every_n_epochs = 1
        self.every_n_train_steps = every_n_train_steps or 0
        self.every_n_epochs = every_n_epochs or 0
        self.train_time_interval = train_time_interval
        self.save_on_train_epoch_end = save_on_train_epoch_end
        self.enable_version_counter = enable_version_counter
        self.async_save = async_save
        self.on_save_error = on_save_error
        _check_arguments(self)

        self._clock = None if train_time_interval is None else AgreedClock(train_time_interval.total_seconds())
        self._in_steps = self.every_n_train_steps > 0 or self._clock is not None
        self._forget()

    def _forget(self) -> None:
        """Nothing is saved yet."""
        self.best_model_path = ""
        self.best_model_score: Tensor | None = None
        self.best_k_models: dict[str, Tensor] = {}
        self.kth_best_model_path = ""
        self.kth_value: Tensor = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        self.current_score: Tensor | None = None
        self.last_model_path = ""
        self._last_target = ""  # where last_model_path points
        self._last_checkpoint_saved = ""
        self._last_global_step_saved = 0  # before the first update there is nothing to save
        self._last_step_seen = 0
        self._retired: list[str] = []
        self._runs: list[str] = []  # this run and those that it goes on from: what they saved is ours to remove
        self._waits_for_validation = self._training = False
        self._watch = Watch()

    @property
    def state_key(self) -> str:
        when = f"'every_n_train_steps': {self.every_n_train_steps}, 'every_n_epochs': {self.every_n_epochs}, "
        when += f"'train_time_interval': {self.train_time_interval!r}"
        return f"{type(self).__qualname__}{{'monitor': {self.monitor!r}, 'mode': {self.mode!r}, {when}}}"

    # --- when --------------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage == "fit":
            self._forget()  # a second fit is another run, or goes on with what its checkpoint says
            self._find_dirpath(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            self._find_dirpath(trainer)  # a run that is resumed goes on in its own folder

    def _find_dirpath(self, trainer: Trainer) -> None:
        dirpath = self._given_dirpath or _absolute(join(str(trainer.log_dir), "checkpoints"))
        if self.dirpath not in (None, dirpath):  # this object served another run before, whose files are not ours
            self._forget()
        self.dirpath = dirpath

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._last_step_seen = trainer.global_step
        self._training = True
        self._watch.start()
        if self._clock is not None:
            self._clock.start(trainer.global_step)
        if self.async_save and self.save_top_k != 0:
            reserve_memory(trainer, self.save_weights_only)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._in_steps:
            return
        step = trainer.global_step
        if step == self._last_step_seen:  # inside a window
            return
        self._last_step_seen = step
        due = self.every_n_train_steps > 0 and step % self.every_n_train_steps == 0
        if self._clock is not None:
            due = self._clock.is_over(step, trainer.strategy) or due
        if not due or self._must_not_save(trainer):
            return
        if self.monitor is not None and self._fresh_metrics_follow(trainer):
            self._waits_for_validation = True
        else:
            self._act(trainer, due=True)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._watch.validated = True
        waited, self._waits_for_validation = self._waits_for_validation, False
        if self._must_not_save(trainer):
            return
        if waited:
            self._act(trainer, due=True)
        elif not self._in_steps and not self._should_save_on_train_epoch_end(trainer):
            self._act(trainer, due=self._epoch_is_due(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._watch.epoch_ended = True
        if self.monitor is not None and self.save_top_k != 0 and not trainer.fast_dev_run:
            self._is_there(trainer, trainer.callback_metrics)
        if self._in_steps or self._must_not_save(trainer):
            return
        if self._should_save_on_train_epoch_end(trainer):
            self._act(trainer, due=self._epoch_is_due(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._training = False
        if self.save_last and not self._last_checkpoint_saved and not self._must_not_save(trainer):
            self._act(trainer, due=False)

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        if not self.save_on_exception or not self._training or self._must_not_save(trainer):
            return
        if trainer.world_size > 1:  # a save needs every rank, and nobody knows whether all are here
            rank_zero_warn("save_on_exception: nothing was saved, since other ranks may still be training.")
            return
        self._act(trainer, due=False, always=True)
        rank_zero_info(f"{type(exception).__name__} was raised ({exception}): saved {self._last_checkpoint_saved}.")

    def save_to_go_on(self, trainer: Trainer) -> str:
        """Save all of the state at once, because the process is about to end; returns its path. On every rank.

        It is none of the best and does not count as one: the run that goes on from it retires it.
        """
        trainer.settle_saves()
        if self.save_weights_only or not self._must_not_save(trainer):
            self._find_dirpath(trainer)
            self._act(trainer, due=False, always=True, to_go_on=True)
        return self._last_checkpoint_saved

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._let_go(trainer)

    def _must_not_save(self, trainer: Trainer) -> bool:
        return (
            bool(trainer.fast_dev_run)
            or trainer.state.fn != "fit"
            or trainer.sanity_checking
            or self._last_global_step_saved == trainer.global_step
        )

    def _epoch_is_due(self, trainer: Trainer) -> bool:
        return self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        if self.save_on_train_epoch_end is not None:
            return self.save_on_train_epoch_end
        if trainer.check_val_every_n_epoch != 1:  # then validation tells when there is something new
            return False
        return sum(trainer.num_val_batches) == 0 or trainer.val_check_interval == 1.0

    def _fresh_metrics_follow(self, trainer: Trainer) -> bool:
        """Whether a validation comes right after this update, or the first one has yet to bring the metric."""
        if "validation" in trainer.progress.due:
            return True
        return self.monitor not in trainer.callback_metrics and self._watch.may_still_come(trainer)

    # --- what ----------------------------------------------------------------------------------------------------
    def _act(self, trainer: Trainer, due: bool, always: bool = False, to_go_on: bool = False) -> None:
        """Save if this is one of the best, or for `save_last`; on every rank."""
        trainer.settle_saves()  # what became of the last one is known before anything is decided
        if trainer.run_id not in self._runs:
            self._runs = [*self._runs, trainer.run_id]
        metrics = self._candidates(trainer)
        is_top = due and self._is_top(trainer, metrics)
        if not (is_top or self.save_last or always):
            return
        path = self._first_free(trainer, metrics, ("suspended-" if to_go_on else "") + self._template)
        pointer = self._first_free(trainer, metrics, self.CHECKPOINT_NAME_LAST) if self.save_last else ""
        before, undo = self._kept(), self._noted()
        if self.monitor is None and self.save_top_k == -1:  # what was saved as one of the best stays
            before = [old for old in before if old != self.best_model_path]
        if is_top:
            self._note_top(path, metrics)
        if self.save_last:
            if self.last_model_path not in ("", pointer):
                self._retired.append(self.last_model_path)
            self.last_model_path, self._last_target = pointer, path
        self._retired += [old for old in before if old not in self._kept()]
        self._last_checkpoint_saved = path
        if not always:  # else what is due at this step, after the validation that it cut off, is still to be saved
            self._last_global_step_saved = trainer.global_step
        if self.verbose:
            rank_zero_info(self._message(trainer, path, is_top))

        # What this process resumed from stays while it runs; it is removed after the next resume.
        removable = [old for old in self._retired if old != trainer.ckpt_path]
        if to_go_on and not self.save_last:
            self._retired.append(path)

        def then(saved: str) -> None:
            """On rank 0, once it is durable: point `last` to it and remove what it replaced."""
            if pointer and self._is_ours(pointer):
                write_pointer(pointer, saved)
            for old in removable:
                self._remove_checkpoint(old)

        def settled(outcome: Outcome) -> None:
            """On every rank, when all know what became of it."""
            if not outcome.path:
                vars(self).update(undo)
                return
            if outcome.path != path:  # somebody else took the name in the meantime
                self._rename(path, outcome.path)
            self._retired = [old for old in self._retired if old not in removable]
            if trainer.is_global_zero:
                for logger in trainer.loggers:
                    logger.after_save_checkpoint(self)

        follow_up = FollowUp(then, settled, tolerates=self.on_save_error == "warn")
        wait = always or not self.async_save
        weights_only = self.save_weights_only and not to_go_on
        trainer.save_checkpoint(path, weights_only, wait=wait, follow_up=follow_up)

    def _noted(self) -> dict[str, Any]:
        """What a save that fails must leave as it was."""
        held = {name: getattr(self, name) for name in _NOTED}
        return {name: value.copy() if isinstance(value, (dict, list)) else value for name, value in held.items()}

    def _candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        """The metrics, equal on every rank, with `epoch` and `step`."""
        metrics = dict(trainer.reduced_metrics())
        for name, count in (("epoch", trainer.current_epoch), ("step", trainer.global_step)):
            metrics[name] = metrics[name].int() if name in metrics else torch.tensor(count)
        return metrics

    def _is_top(self, trainer: Trainer, metrics: dict[str, Tensor]) -> bool:
        if self.save_top_k == 0:
            return False
        if self.monitor is None:
            return True
        return self._is_there(trainer, metrics) and self.check_monitor_top_k(trainer, metrics[self.monitor])

    def _is_there(self, trainer: Trainer, metrics: dict[str, Tensor]) -> bool:
        """Whether the monitored metric is there; ConfigurationError when it should have been."""
        assert self.monitor is not None
        if self.monitor in metrics or self._watch.may_still_come(trainer):
            return self.monitor in metrics
        raise never_logged(type(self).__name__, self.monitor, set(metrics) - {"epoch", "step"})

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether a checkpoint with the score `current` is one of the best."""
        return current is not None and qualifies(float(current), self.best_k_models, self.save_top_k, self.mode)

    def _note_top(self, path: str, metrics: dict[str, Tensor]) -> None:
        if self.monitor is None:
            self.best_model_path = path
            return
        if len(self.best_k_models) == self.save_top_k:
            del self.best_k_models[self.kth_best_model_path]
        self.current_score = torch.tensor(comparable(float(metrics[self.monitor]), self.mode))
        self.best_k_models[path] = self.current_score
        if len(self.best_k_models) == self.save_top_k:
            self.kth_best_model_path = worst(self.best_k_models, self.mode)
            self.kth_value = self.best_k_models[self.kth_best_model_path]
        self.best_model_path = best(self.best_k_models, self.mode)
        self.best_model_score = self.best_k_models[self.best_model_path]

    def _kept(self) -> list[str]:
        """What must stay on the disk, as far as this callback is concerned."""
        newest = [self.best_model_path] if self.monitor is None and self.save_top_k == 1 else []
        return list(dict.fromkeys(path for path in (*self.best_k_models, *newest, self._last_target) if path))

    def saved_paths(self) -> dict[str, float | None]:
        """The checkpoints that are kept → their scores, None where nothing is monitored."""
        scores = {path: float(score) for path, score in self.best_k_models.items()}
        return {path: scores.get(path) for path in dict.fromkeys((*self._kept(), self.best_model_path)) if path}

    def _rename(self, old: str, new: str) -> None:
        if old in self.best_k_models:
            self.best_k_models = {new if p == old else p: score for p, score in self.best_k_models.items()}
        self._retired = [new if path == old else path for path in self._retired]
        for name in ("best_model_path", "kth_best_model_path", "_last_target", "_last_checkpoint_saved"):
            if getattr(self, name) == old:
                setattr(self, name, new)

    def _let_go(self, trainer: Trainer) -> None:
        """On rank 0, once the newest checkpoint is whole: point `last` to it and remove what it replaced."""
        if not self._last_checkpoint_saved:
            return
        if not trainer.is_global_zero:
            self._retired = []
        elif is_checkpoint(self._last_checkpoint_saved):
            stale = self.save_last and resolve_pointer(self.last_model_path) != self._last_target
            cut_between = stale and self._last_target == self._last_checkpoint_saved
            if cut_between and self._is_ours(self.last_model_path):
                write_pointer(self.last_model_path, self._last_target)
            # What this process resumed from stays while it runs; it is removed after the next resume.
            removable = [path for path in self._retired if path not in (trainer.ckpt_path, self._last_checkpoint_saved)]
            for path in removable:
                self._remove_checkpoint(path)
                self._retired.remove(path)

    def _remove_checkpoint(self, path: str) -> None:
        """Remove a checkpoint or a pointer, if it is still there and still ours."""
        storage, place = storage_of(path)
        if not self._is_ours(path):
            return
        if is_checkpoint(path):
            remove(path)
        elif storage.is_file(place):
            storage.remove(place)

    def _is_ours(self, path: str) -> bool:
        """False where another run saved the checkpoint `path`, or what it points to."""
        try:
            run = read_manifest(path).meta.get("run")
        except CheckpointError:
            return True  # nothing valid is there
        return run is None or run in self._runs  # None: saved before checkpoints said whose they are

    def _message(self, trainer: Trainer, path: str, is_top: bool) -> str:
        where = f"Epoch {trainer.current_epoch}, global step {trainer.global_step}"
        if self.monitor is None or not is_top:
            return f"{where}: saving model to {path!r}"
        rank = f" as top {self.save_top_k}" if self.save_top_k > 0 else ""
        score, best_score = float(self.current_score or 0), float(self.best_model_score or 0)
        reached = f"{self.monitor!r} reached {score:0.5f} (best {best_score:0.5f})"
        return f"{where}: {reached}, saving model to {path!r}{rank}"

    # --- its name ------------------------------------------------------------------------------------------------
    def format_checkpoint_name(
        self, metrics: dict[str, Tensor], filename: str | None = None, ver: int | None = None
    ) -> str:
        """The path, in `dirpath` if that is known, of a checkpoint with these metrics, with `-v<ver>` if given."""
        template = filename or self._template
        name = format_name(template, metrics, self.auto_insert_metric_name, self.CHECKPOINT_EQUALS_CHAR)
        if ver is not None:
            name = f"{name}{self.CHECKPOINT_JOIN_CHAR}v{ver}"
        name += self.FILE_EXTENSION
        return join(self.dirpath, name) if self.dirpath else name

    @property
    def _template(self) -> str:
        return self.filename or f"{{epoch}}{self.CHECKPOINT_JOIN_CHAR}{{step}}"

    def file_exists(self, filepath: str, trainer: Trainer) -> bool:
        """Whether the path is taken, as rank 0 sees it; on every rank."""
        storage, place = storage_of(filepath)
        return bool(trainer.strategy.broadcast_object(trainer.is_global_zero and storage.exists(place)))

    def _is_our_pointer(self, path: str, trainer: Trainer) -> bool:
        """False also where a run that began at the same time has taken its name."""
        if path != self.last_model_path:
            return False
        return bool(trainer.strategy.broadcast_object(trainer.is_global_zero and self._is_ours(path)))

    def _first_free(self, trainer: Trainer, metrics: dict[str, Tensor], filename: str) -> str:
        """Where a checkpoint goes, or `last` points from: its own pointer again, but never another run's."""
        path, version = self.format_checkpoint_name(metrics, filename), self.STARTING_VERSION
        while self.file_exists(path, trainer) and not self._is_our_pointer(path, trainer):
            path = self.format_checkpoint_name(metrics, filename, version)
            version += 1
        return path

    # --- what a resumed run must know ------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        noted = {name.lstrip("_"): value for name, value in self._noted().items()}
        waits = self._waits_for_validation
        return {"monitor": self.monitor, "dirpath": self.dirpath, **noted, "waits_for_validation": waits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_model_path = state_dict["best_model_path"]
        dirpath = state_dict.get("dirpath", self.dirpath)
        if dirpath != self.dirpath:
            rank_zero_warn(
                f"ModelCheckpoint: the checkpoint was saved with dirpath={dirpath!r}, this run has {self.dirpath!r}. "
                "What is there belongs to the other run and is left alone; only best_model_path is taken over."
            )
            return
        for name in (*_NOTED, "_waits_for_validation"):
            if (key := name.lstrip("_")) in state_dict:
                setattr(self, name, state_dict[key])


def _absolute(path: str) -> str:
    return path if is_url(path) else os.path.realpath(os.path.expanduser(path))


def _check_arguments(callback: ModelCheckpoint) -> None:
    if callback.mode not in ("min", "max"):
        raise ConfigurationError(f"ModelCheckpoint: `mode` can be 'min' or 'max', but got {callback.mode!r}.")
    if callback.save_top_k < -1:
        raise ConfigurationError(
            f"Invalid value for save_top_k={callback.save_top_k}. Must be >= -1: -1 keeps all checkpoints, 0 none."
        )
    if callback.monitor is None and callback.save_top_k not in (-1, 0, 1):
        raise ConfigurationError(
            f"ModelCheckpoint(save_top_k={callback.save_top_k}, monitor=None) is not a valid configuration. No "
            "quantity for top_k to track. Give monitor=, or save_top_k=-1 to keep all."
        )
    if callback.on_save_error not in ("raise", "warn"):
        raise ConfigurationError(f"on_save_error={callback.on_save_error!r}: use 'raise' or 'warn'.")
    if "/" in re.sub(r"\{[^{}]*\}", "", callback.filename or ""):  # in braces it is part of a metric's name
        raise ConfigurationError(
            f"ModelCheckpoint(filename={callback.filename!r}) must be a plain name. Put the folders into dirpath."
        )
    if callback.save_last not in (None, True, False, "link"):
        raise ConfigurationError(f"save_last={callback.save_last!r}: use True, False or 'link'.")
    if not callback.enable_version_counter:
        raise ConfigurationError(
            "enable_version_counter=False would overwrite checkpoints, which are never overwritten here: a taken name "
            "gets -v1. Leave it out; the path of the newest is best_model_path, or last.ckpt with save_last=True."
        )
    counts = {"every_n_train_steps": callback.every_n_train_steps, "every_n_epochs": callback.every_n_epochs}
    for name, count in counts.items():
        if count < 0:
            raise ConfigurationError(f"Invalid value for {name}={count}. Must be >= 0")
    if sum(count > 0 for count in counts.values()) + (callback.train_time_interval is not None) > 1:
        raise ConfigurationError(
            f"Combination of parameters every_n_train_steps={counts['every_n_train_steps']}, every_n_epochs="
            f"{counts['every_n_epochs']} and train_time_interval={callback.train_time_interval} should be mutually "
            "exclusive. Use two ModelCheckpoint callbacks."
        )
