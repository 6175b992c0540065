"""Optimizers and schedulers: what `configure_optimizers` returned.

`parse_optimizers` turns the six forms into optimizers and `SchedulerConfig`s, by which `schedules.py` steps them. What
user code gets in the place of an optimizer is in `optimizer_handle.py`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau

from ..errors import ConfigurationError, did_you_mean
from .optimizer_handle import bare
from .rank_zero import rank_zero_warn

_FORMS = """It should be one of:
  an optimizer;
  a list or tuple of optimizers;
  two lists, of optimizers and of schedulers (or scheduler dicts);
  a dict with "optimizer" and, if wanted, "lr_scheduler" (a scheduler or a scheduler dict) and "monitor";
  a list or tuple of such dicts;
  None."""


@dataclass
class SchedulerConfig:
    """A learning-rate scheduler and when it steps; the fields are the keys of a scheduler dict."""

    scheduler: Any
    name: str | None = None
    interval: str = "epoch"  # or "step": optimizer steps
    frequency: int = 1  # in units of `interval`
    reduce_on_plateau: bool = False  # its step takes the monitored metric
    monitor: str | None = None
    strict: bool = True  # a missing metric is an error


class NullOptimizer(Optimizer):
    """The optimizer of a run without one: holds no parameters, and its step does nothing."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(1)], {"lr": 0.0})
        self.param_groups.clear()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call `closure`, if any."""
        return closure() if closure is not None else None


# --- what configure_optimizers returned ------------------------------------------------------------------------------
def parse_optimizers(returned: Any, automatic: bool = True) -> tuple[list[Optimizer], list[SchedulerConfig]]:
    """The optimizers and schedulers in what `configure_optimizers` returned.

    For None (and empty lists) a `NullOptimizer`, with a warning. Under manual optimization (`automatic=False`) there
    may be several optimizers, and when schedulers step is up to the user.
    Raises ConfigurationError for any other form, unknown or wrong keys, a ReduceLROnPlateau without a monitor, a
    scheduler of another optimizer, and several optimizers under automatic optimization.
    """
    optimizers, schedulers = _split(returned)
    optimizers = [bare(optimizer) for optimizer in optimizers]
    configs = [_scheduler_config(scheduler, monitor, automatic) for scheduler, monitor in schedulers]
    if not optimizers:
        rank_zero_warn("configure_optimizers returned no optimizer: the run goes on without one.")
        optimizers = [NullOptimizer()]
    if automatic and len(optimizers) > 1:
        raise ConfigurationError(
            f"configure_optimizers returned {len(optimizers)} optimizers; automatic optimization takes one. Set "
            "self.automatic_optimization = False in __init__, and in training_step use `a, b = self.optimizers()`, "
            "self.manual_backward(loss) and a.step(), or put all parameters into one optimizer's parameter groups."
        )
    for config in configs:
        of = getattr(config.scheduler, "optimizer", None)
        if of is not None and not any(bare(of) is optimizer for optimizer in optimizers):
            raise ConfigurationError(
                f"configure_optimizers returned the scheduler {_name(config.scheduler)} of an optimizer that it did "
                "not return. Make the scheduler with the optimizer that is returned, or return that one too."
            )
    return optimizers, configs


def _split(returned: Any) -> tuple[list[Optimizer], list[tuple[Any, str | None]]]:
    """Optimizers, and schedulers as returned, each with the monitor that stood beside it."""
    if returned is None:
        return [], []
    if isinstance(returned, Optimizer):
        return [returned], []
    if isinstance(returned, Mapping):
        return _split_dict(returned)
    if isinstance(returned, (list, tuple)):
        if all(isinstance(item, Optimizer) for item in returned):
            return list(returned), []
        if all(isinstance(item, Mapping) for item in returned):
            parts = [_split_dict(item) for item in returned]
            return [o for optimizers, _ in parts for o in optimizers], [s for _, some in parts for s in some]
        if len(returned) == 2 and isinstance(returned[0], (list, tuple)):
            optimizers, schedulers = returned
            if not all(isinstance(item, Optimizer) for item in optimizers):
                raise _unknown_form(returned)
            schedulers = schedulers if isinstance(schedulers, (list, tuple)) else [schedulers]
            return list(optimizers), [(scheduler, None) for scheduler in schedulers if scheduler is not None]
    raise _unknown_form(returned)


def _split_dict(returned: Mapping[str, Any]) -> tuple[list[Optimizer], list[tuple[Any, str | None]]]:
    if "frequency" in returned:
        raise ConfigurationError(
            'configure_optimizers returned a dict with "frequency" beside "optimizer": optimizers that take turns are '
            "written with self.automatic_optimization = False now. A scheduler's frequency goes into its own dict: "
            '{"optimizer": ..., "lr_scheduler": {"scheduler": ..., "frequency": ...}}.'
        )
    _refuse_unknown_keys(returned, ["optimizer", "lr_scheduler", "monitor"], "the dict from configure_optimizers")
    if not isinstance(returned.get("optimizer"), Optimizer):
        raise ConfigurationError(
            f'The dict from configure_optimizers has {returned.get("optimizer")!r:.80} as "optimizer"; that must be a '
            "torch.optim.Optimizer."
        )
    scheduler = returned.get("lr_scheduler")
    return [returned["optimizer"]], [] if scheduler is None else [(scheduler, returned.get("monitor"))]


def _unknown_form(returned: Any) -> ConfigurationError:
    what = type(returned).__name__
    if isinstance(returned, (list, tuple)):
        what += f" of {', '.join(type(item).__name__ for item in returned)}"
    return ConfigurationError(f"configure_optimizers returned {'an' if what[0] in 'aeiou' else 'a'} {what}. {_FORMS}")


def _scheduler_config(given: Any, monitor: str | None, automatic: bool) -> SchedulerConfig:
    """`given` is a scheduler or a scheduler dict; `monitor` stood beside it and is for a scheduler on a plateau."""
    keys = dict(given) if isinstance(given, Mapping) else {"scheduler": given}
    _refuse_unknown_keys(keys, [field.name for field in fields(SchedulerConfig)], "a scheduler dict")
    if "scheduler" not in keys:
        raise ConfigurationError(f'A scheduler dict has no "scheduler", only {sorted(keys)}.')
    config = SchedulerConfig(**keys)
    on_plateau = isinstance(config.scheduler, ReduceLROnPlateau)
    if on_plateau and config.monitor is None:
        config.monitor = monitor
    _check_scheduler(config)
    if not automatic:
        ignored = [key for key in ("monitor", "strict", "reduce_on_plateau") if key in keys]
        if ignored:
            rank_zero_warn(
                f"The scheduler dict of {_name(config.scheduler)} has {ignored}, which manual optimization ignores: "
                "call the scheduler's step() yourself.",
                RuntimeWarning,
            )
        return config
    config.reduce_on_plateau |= on_plateau or (config.monitor is not None and _takes_metric(config.scheduler))
    if config.reduce_on_plateau and config.monitor is None:
        raise ConfigurationError(
            f"The scheduler {_name(config.scheduler)} needs the name of a logged metric, as in "
            '{"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}.'
        )
    if config.interval == "epoch" and isinstance(config.scheduler, (OneCycleLR, CyclicLR)):
        rank_zero_warn(
            f"The scheduler {_name(config.scheduler)} steps once an epoch. It is usually meant to step with the "
            'optimizer: {"scheduler": scheduler, "interval": "step"}.',
            RuntimeWarning,
        )
    return config


def _check_scheduler(config: SchedulerConfig) -> None:
    scheduler = config.scheduler
    if not callable(getattr(scheduler, "step", None)):
        raise ConfigurationError(
            f"configure_optimizers returned {scheduler!r:.80} of type {_name(scheduler)} as a scheduler; it has no "
            f"step(). {_FORMS}"
        )
    if config.interval not in ("epoch", "step"):
        raise ConfigurationError(
            f'The interval of the scheduler {_name(scheduler)} is {config.interval!r}; it must be "epoch" or "step".'
        )
    if isinstance(config.frequency, bool) or not isinstance(config.frequency, int) or config.frequency < 1:
        raise ConfigurationError(
            f"The frequency of the scheduler {_name(scheduler)} is {config.frequency!r}; it must be an int of at least "
            "1: it steps every that many epochs or optimizer steps."
        )
    if not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")):
        rank_zero_warn(
            f"The scheduler {_name(scheduler)} has no state_dict() and load_state_dict(): it is not saved in "
            "checkpoints, and a resumed run begins with a new one."
        )


def _takes_metric(scheduler: Any) -> bool:
    """Whether the first argument of a custom scheduler's step is a metric, by its name or because it is needed."""
    parameters = inspect.signature(scheduler.step).parameters.values()
    first = next((p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)), None)
    if first is None:
        return False
    return "metric" in first.name or (first.default is first.empty and first.name not in ("epoch", "step"))


def _refuse_unknown_keys(given: Iterable[Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            hint = did_you_mean(str(key), known, "The keys are")
            raise ConfigurationError(f"There is no key {key!r} in {where}. {hint}")


def _name(scheduler: Any) -> str:
    return type(scheduler).__name__


# --- how long a run is -----------------------------------------------------------------------------------------------
def estimated_stepping_batches(
    max_epochs: int | None, max_steps: int, num_training_batches: float, accumulate_grad_batches: int = 1
) -> float:
    """How many optimizer steps `fit` will take; an int wherever it is known.

    `num_training_batches` are the micro-batches of one rank in an epoch (inf: a loader without length). Windows never
    cross an epoch, so the last one of an epoch may be short. inf when nothing but time or a signal ends the run;
    `max_steps` (-1: none) where the epochs have no known length.
    """
    if max_epochs is None or max_epochs == -1:
        return math.inf if max_steps == -1 else max_steps
    if num_training_batches == math.inf:
        return max_steps
    steps = math.ceil(num_training_batches / accumulate_grad_batches) * max(max_epochs, 1)
    return steps if max_steps == -1 else min(steps, max_steps)
