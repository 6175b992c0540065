"""The Trainer's arguments, checked and in one spelling.

Each function takes what users may write and returns what the trainer uses, or raises a ConfigurationError that says
what was wrong with its value and what to write instead.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, ParamSpec, TypeGuard

from ..errors import ConfigurationError, UnknownArgumentError, WrongTypeError, did_you_mean
from .argument_types import check_types, kinds_of
from .hooks import overridden
from .module import Module

P = ParamSpec("P")

#: Arguments that Lightning's Trainer had or has, and what to write here.
REMOVED_ARGUMENTS = {
    "gpus": "accelerator='gpu', devices={value!r}",
    "num_gpus": "accelerator='gpu', devices={value!r}",
    "tpu_cores": "accelerator='tpu', devices={value!r}",
    "ipus": "accelerator and devices",
    "num_processes": "accelerator='cpu', devices={value!r}",
    "auto_select_gpus": "devices='auto'",
    "distributed_backend": "strategy={value!r}",
    "checkpoint_callback": "enable_checkpointing={value!r}",
    "progress_bar_refresh_rate": "callbacks=[TQDMProgressBar(refresh_rate={value!r})]",
    "process_position": "callbacks=[TQDMProgressBar(process_position={value!r})]",
    "weights_summary": "enable_model_summary or callbacks=[ModelSummary(max_depth=...)]",
    "weights_save_path": "default_root_dir, or ModelCheckpoint(dirpath={value!r})",
    "resume_from_checkpoint": "trainer.fit(model, ckpt_path={value!r})",
    "auto_lr_find": "a schedule of your own",
    "auto_scale_batch_size": "global_batch_size",
    "stochastic_weight_avg": "callbacks=[StochasticWeightAveraging(...)]",
    "terminate_on_nan": "detect_anomaly, or EarlyStopping(check_finite=True)",
    "amp_backend": "precision",
    "amp_level": "precision",
    "replace_sampler_ddp": "use_distributed_sampler={value!r}",
    "multiple_trainloader_mode": "CombinedLoader(loaders, mode={value!r})",
    "truncated_bptt_steps": "manual optimization",
    "move_metrics_to_cpu": "nothing: metrics are copied without blocking",
    "track_grad_norm": "gradient_clip_val, whose norm is logged as grad_norm",
    "log_gpu_memory": "callbacks=[DeviceStatsMonitor()]",
    "flush_logs_every_n_steps": "CSVLogger(flush_logs_every_n_steps={value!r})",
    "reload_dataloaders_every_epoch": "reload_dataloaders_every_n_epochs=1",
    "prepare_data_per_node": "prepare_data_per_node of the module or data module",
    "max_nb_epochs": "max_epochs={value!r}",
    "epochs": "max_epochs={value!r}",
    "num_epochs": "max_epochs={value!r}",
    "steps": "max_steps={value!r}",
    "plugins": "a Strategy object, or precision",
}

#: Arguments that are whole numbers: the least one, and what else may be given.
_COUNTS: dict[str, tuple[Any, ...]] = {
    "max_epochs": (0, None, -1),
    "max_steps": (0, -1),
    "min_epochs": (0, None),
    "min_steps": (0, None),
    "num_nodes": (1,),
    "fast_dev_run": (0,),
    "num_sanity_val_steps": (0, -1),
    "check_val_every_n_epoch": (1, None),
    "accumulate_grad_batches": (1,),
    "global_batch_size": (1, None),
    "log_every_n_steps": (0,),
    "reload_dataloaders_every_n_epochs": (0,),
}
#: Arguments that are numbers of batches or fractions of all.
_LIMITS = (*(f"limit_{stage}_batches" for stage in ("train", "val", "test", "predict")), "overfit_batches")
#: What a trainer may do beside training.
_EXTRAS = ("enable_progress_bar", "enable_checkpointing", "enable_model_summary")
_MEANT_BY_NONE = {
    **dict.fromkeys(_EXTRAS, True),
    "num_sanity_val_steps": 2,
    "val_check_interval": 1.0,
    "overfit_batches": 0,
    "accumulate_grad_batches": 1,
    "log_every_n_steps": 50,
    "default_root_dir": "runs",
}


def named_only(init: Callable[P, None]) -> Callable[P, None]:
    """`Trainer.__init__`, which keeps the arguments that were named as `given`, and refuses all others."""
    known = list(inspect.signature(init).parameters)[1:]
    # Numbers have checks of their own below, which tell their range too.
    kinds = {name: kind for name, kind in kinds_of(init).items() if kind[0] not in ("int", "float")}

    @functools.wraps(init)
    def checked(trainer: Any, *values: Any, **given: Any) -> None:
        if values:
            raise WrongTypeError(f"Trainer({values[0]!r}): nothing is positional; write Trainer(name=value).")
        refuse_unknown({name: value for name, value in given.items() if name not in known}, known)
        given = {name: _plain(value) for name, value in given.items()}
        check_types("Trainer", kinds, given)
        trainer.given = given
        init(trainer, **given)

    return checked  # type: ignore[return-value]


def refuse_unknown(unknown: Mapping[str, Any], known: Iterable[str]) -> None:
    """UnknownArgumentError for the first argument that the Trainer does not have, naming the right one."""
    for name, value in unknown.items():
        if name in REMOVED_ARGUMENTS:
            instead = REMOVED_ARGUMENTS[name].format(value=value)
            raise UnknownArgumentError(f"Trainer({name}={value!r}) is not an argument (any more). Write {instead}.")
        raise UnknownArgumentError(
            f"Trainer({name}={value!r}): there is no argument {name!r}. {did_you_mean(name, known)}"
        )


def _plain(value: Any) -> Any:
    """A number of NumPy or torch as Python's own; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_limit(name: str, value: Any) -> int | float | None:
    """A number of batches (int) or a fraction of them (float from 0 to 1)."""
    if value is None:
        return None
    if not _is_number(value) or value < 0 or (isinstance(value, float) and value > 1):
        raise ConfigurationError(
            f"{name}={value!r} is neither a number of batches (an int from 0) nor a fraction of them (a float from 0.0 "
            "to 1.0)."
        )
    return value


def check_count(name: str, value: Any, least: int = 1, special: tuple[Any, ...] = ()) -> Any:
    """A whole number of at least `least`, or one of `special`."""
    number = _plain(value)
    if number in special and not isinstance(number, bool):
        return number
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        also = "".join(f" or {s}" for s in special if s is not None)
        raise ConfigurationError(f"{name}={value!r} is not a whole number of at least {least}{also}.")
    return number


def parse_seconds(name: str, value: Any) -> float | None:
    """Seconds in "DD:HH:MM:SS", a timedelta, or a dict of timedelta's arguments."""
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", value.strip())
        if match is None:
            raise ConfigurationError(
                f"{name}={value!r} is not of the form 'DD:HH:MM:SS', as '00:01:30:00' for 90 minutes."
            )
        days, hours, minutes, seconds = map(int, match.groups())
        value = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    if isinstance(value, dict):
        try:
            value = timedelta(**value)
        except TypeError:
            raise ConfigurationError(f"{name}={value!r}: use keys days, hours, minutes, seconds.") from None
    if not isinstance(value, timedelta):
        raise ConfigurationError(f"{name}={value!r}: use 'DD:HH:MM:SS', a timedelta or a dict such as {{'hours': 3}}.")
    return value.total_seconds()


def check_clipping(value: Any, algorithm: Any) -> tuple[float | None, str | None]:
    """`gradient_clip_val` and `gradient_clip_algorithm`."""
    algorithm = getattr(algorithm, "value", algorithm)
    if algorithm not in (None, "norm", "value"):
        raise ConfigurationError(f"gradient_clip_algorithm={algorithm!r} is not known. Use 'norm' or 'value'.")
    if value is not None and (not _is_number(value) or value < 0):
        raise ConfigurationError(
            f"gradient_clip_val={value!r} is not a number of at least 0. Use None for no clipping."
        )
    return (value or None), algorithm


@dataclass
class Arguments:
    """The arguments as the trainer uses them; the names are Trainer's own."""

    max_epochs: int | None
    max_steps: int
    max_seconds: float | None
    min_epochs: int | None
    min_steps: int | None
    limit_train_batches: int | float | None
    limit_val_batches: int | float | None
    limit_test_batches: int | float | None
    limit_predict_batches: int | float | None
    overfit_batches: int | float
    fast_dev_run: int
    num_sanity_val_steps: int
    val_check_interval: int | float | timedelta
    check_val_every_n_epoch: int | None
    accumulate_grad_batches: int
    global_batch_size: int | None
    gradient_clip_val: float | None
    gradient_clip_algorithm: str | None
    log_every_n_steps: int
    enable_progress_bar: bool
    enable_checkpointing: bool
    enable_model_summary: bool
    default_root_dir: str
    deterministic: bool | str | None
    benchmark: bool | None
    detect_anomaly: bool
    inference_mode: bool
    use_distributed_sampler: bool
    sync_batchnorm: bool
    reload_dataloaders_every_n_epochs: int
    barebones: bool
    compile: bool | str | dict[str, Any] | None

    @classmethod
    def checked(cls, given: Mapping[str, Any], named: Mapping[str, Any]) -> Arguments:
        """From all that Trainer was given, and what of it was `named`; ConfigurationError for what cannot be used."""
        _refuse_what_cannot_be_meant(given, named)
        values: dict[str, Any] = {
            name: _MEANT_BY_NONE.get(name) if value is None else value for name, value in given.items()
        }
        if isinstance(values["fast_dev_run"], bool):
            values["fast_dev_run"] = int(values["fast_dev_run"])
        for name, (least, *special) in _COUNTS.items():
            values[name] = check_count(name, values[name], least, tuple(special))
        for name in _LIMITS:
            values[name] = check_limit(name, values[name])
        values["max_seconds"] = parse_seconds("max_time", values["max_time"])
        values["val_check_interval"] = _check_interval(values["val_check_interval"])
        clipping = check_clipping(given["gradient_clip_val"], named.get("gradient_clip_algorithm"))
        values["gradient_clip_val"], values["gradient_clip_algorithm"] = clipping
        values["default_root_dir"] = os.fspath(values["default_root_dir"])
        if fast := values["fast_dev_run"]:
            values |= {"max_epochs": 1, "max_steps": fast, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
            values["enable_checkpointing"] = False
        if values["barebones"]:
            values |= dict.fromkeys(_EXTRAS, False)
            values |= {"num_sanity_val_steps": 0, "log_every_n_steps": 0}
        values["log_every_n_steps"] = values["log_every_n_steps"] or sys.maxsize  # 0: never, as Lightning spells it
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def limit_of(self, stage: str) -> int | float | None:
        """The limit for "train", "val", "test" or "predict": by fast_dev_run, overfit_batches or its own argument."""
        if self.fast_dev_run:
            return self.fast_dev_run
        if self.overfit_batches and stage in ("train", "val"):
            return self.overfit_batches
        limit: int | float | None = getattr(self, f"limit_{stage}_batches")
        return limit

    def check_fit(self, module: Module) -> None:
        """What `fit` alone needs; ConfigurationError."""
        if self.max_epochs is None and self.max_steps == -1 and self.max_seconds is None:
            raise ConfigurationError(
                "fit() would never end: give Trainer(max_epochs=...), max_steps=... or max_time='DD:HH:MM:SS' "
                "(max_epochs=-1 to train until you stop it)."
            )
        if not overridden(module, "training_step", Module):
            raise ConfigurationError(
                f"{type(module).__name__} has no training_step, so fit() cannot train it. Define "
                "training_step(self, batch, batch_idx) that returns the loss."
            )
        if not overridden(module, "configure_optimizers", Module):
            raise ConfigurationError(
                f"{type(module).__name__} has no configure_optimizers, so fit() cannot train it. Define it to return "
                "an optimizer, or None to train without one."
            )
        if "dataloader_iter" in inspect.signature(module.training_step).parameters:
            raise ConfigurationError(
                f"{type(module).__name__}.training_step takes dataloader_iter, but is handed one batch at a time. "
                "Write training_step(self, batch, batch_idx)."
            )
        if module.automatic_optimization:
            return
        for name in ("gradient_clip_val", "global_batch_size"):
            if getattr(self, name) is not None:
                raise ConfigurationError(
                    f"{name}={getattr(self, name)} cannot be used with manual optimization (automatic_optimization = "
                    "False). Do it in training_step, where the gradients are."
                )
        if self.accumulate_grad_batches != 1:
            raise ConfigurationError(
                f"accumulate_grad_batches={self.accumulate_grad_batches} cannot be used with manual optimization. Call "
                "manual_backward several times before step() in training_step."
            )
        if overridden(module, "loss_weight", Module):
            raise ConfigurationError(
                "loss_weight cannot be used with manual optimization: there is no window to weigh. Weigh the losses in "
                "training_step."
            )


def _check_interval(value: Any) -> int | float | timedelta:
    if isinstance(value, (str, dict, timedelta)):
        seconds = parse_seconds("val_check_interval", value)
        if not seconds or seconds < 0:
            raise ConfigurationError(f"val_check_interval={value!r} is no time that could pass. Use at least a second.")
        return timedelta(seconds=seconds)
    if not _is_number(value) or value <= 0 or (isinstance(value, float) and value > 1):
        raise ConfigurationError(
            f"val_check_interval={value!r} is neither a number of micro-batches (an int from 1) nor a fraction of the "
            "epoch (a float up to 1.0) nor a time ('DD:HH:MM:SS', a timedelta or a dict of its arguments)."
        )
    return value


def _refuse_what_cannot_be_meant(given: Mapping[str, Any], named: Mapping[str, Any]) -> None:
    if given["barebones"]:
        others = "logger log_every_n_steps num_sanity_val_steps fast_dev_run detect_anomaly profiler"
        for name in (*_EXTRAS, *others.split()):
            if named.get(name):
                raise ConfigurationError(
                    f"barebones=True switches {name} off, but {name}={named[name]!r} asks for it. Leave one out."
                )
    if given["global_batch_size"] is not None and named.get("accumulate_grad_batches") is not None:
        raise ConfigurationError(
            f"accumulate_grad_batches={given['accumulate_grad_batches']} and "
            f"global_batch_size={given['global_batch_size']} contradict each other: the first is derived from the "
            "second. Give one of them."
        )
    if isinstance(given["accumulate_grad_batches"], dict):
        raise ConfigurationError(
            f"accumulate_grad_batches={given['accumulate_grad_batches']} is no number. Write "
            "callbacks=[GradientAccumulationScheduler(scheduling=...)] for one that changes with the epochs."
        )
    if given["deterministic"] not in (None, True, False, "warn"):
        raise ConfigurationError(f"deterministic={given['deterministic']!r}: use True, False or 'warn'.")
    if given["compile"] not in (None, True, False, "blocks") and not isinstance(given["compile"], dict):
        raise ConfigurationError(
            f"compile={given['compile']!r}: use True, 'blocks', or a dict of torch.compile's options."
        )
    n_epoch, interval = given["check_val_every_n_epoch"], given["val_check_interval"]
    if n_epoch is None and isinstance(named.get("val_check_interval"), float):
        raise ConfigurationError(
            f"check_val_every_n_epoch=None counts micro-batches across epochs, so val_check_interval={interval!r} "
            "must be a number of them (an int)."
        )
