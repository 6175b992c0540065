"""What is logged under one name in one hook: where that may be, and the values of a window and of an epoch so far.

Values stay on their device. `metrics.py` keeps an `Entry` for each name, and has them reduced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import ConfigurationError
from .metric_objects import is_metric_object
from .reduction import NEUTRAL, Sum, combine, widen

_REDUCTIONS = {"mean": "mean", "avg": "mean", "sum": "sum", "min": "min", "amin": "min", "max": "max", "amax": "max"}

#: For each hook that may log: on_step and on_epoch by default, and whether on_step is possible.
_STEP, _EPOCH, _EPOCH_ONLY = (True, False, True), (False, True, True), (False, True, False)
_IN_A_STEP = (
    "training_step on_before_zero_grad on_before_backward on_after_backward on_before_optimizer_step "
    "configure_gradient_clipping optimizer_step optimizer_zero_grad lr_scheduler_step backward "
    "on_train_batch_start on_train_batch_end"
)
_LOGGING_HOOKS: dict[str, tuple[bool, bool, bool]] = {
    **dict.fromkeys(_IN_A_STEP.split(), _STEP),
    **dict.fromkeys(("on_train_start", "on_train_epoch_start", "on_train_epoch_end"), _EPOCH_ONLY),
}
for _stage in ("validation", "test"):
    _LOGGING_HOOKS |= dict.fromkeys((f"{_stage}_step", f"on_{_stage}_batch_start", f"on_{_stage}_batch_end"), _EPOCH)
    _LOGGING_HOOKS |= dict.fromkeys(
        (f"on_{_stage}_start", f"on_{_stage}_epoch_start", f"on_{_stage}_epoch_end"), _EPOCH_ONLY
    )


@dataclass(slots=True)
class Entry:
    """One name logged in one hook: the values of the window under way, and the running sum of the epoch."""

    name: str
    suffix: str
    dataloader_idx: int | None
    flags: tuple[Any, ...]
    op: str
    on_step: bool
    on_epoch: bool
    prog_bar: bool
    logger: bool
    metric: Any = None
    window: int = -1
    values: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    total: Any = None
    weight: float = 0.0

    @property
    def bare_name(self) -> str:
        """The name as given, with its loader's number."""
        return self.name + self.suffix

    @property
    def step_name(self) -> str:
        """The name of its step values."""
        return f"{self.name}_step{self.suffix}" if self.on_epoch else self.bare_name

    @property
    def epoch_name(self) -> str:
        """The name of its epoch values."""
        return f"{self.name}_epoch{self.suffix}" if self.on_step else self.bare_name

    def add_to_epoch(self, value: Any, weight: float) -> None:
        """Take a batch into the epoch's sum, on the device of the value."""
        if not weight:
            return
        self.weight += weight
        scale = weight if self.op == "mean" else 1
        if self.total is None:
            self.total = widen(value) if self.op in ("min", "max") else widen(value) * scale
        elif self.op in ("min", "max"):
            self.total = combine(self.op, self.total, value)
        elif isinstance(self.total, Tensor) and isinstance(value, Tensor):
            self.total.add_(value, alpha=scale)
        else:
            self.total = self.total + value * scale

    def step_sum(self) -> Sum:
        """What the micro-batches of the window under way come to."""
        total: Any = NEUTRAL[self.op]
        for value, weight in zip(self.values, self.weights, strict=True):
            if weight:
                total = combine(self.op, total, widen(value) * weight if self.op == "mean" else widen(value))
        return Sum(self.op, total, sum(self.weights), self.label(False))

    def epoch_sum(self) -> Sum:
        """What the epoch's batches so far come to."""
        return Sum(self.op, NEUTRAL[self.op] if self.total is None else self.total, self.weight, self.label(True))

    def running(self) -> Any:
        """This rank's epoch value so far."""
        return self.total / self.weight if self.op == "mean" else self.total

    def start_anew(self) -> None:
        """Nothing of the coming epoch was logged."""
        self.window, self.values, self.weights = -1, [], []
        self.total, self.weight = None, 0.0

    def label(self, of_epoch: bool, metric: str | None = None) -> Label:
        """What all ranks must know of its step or epoch value."""
        return Label(self.bare_name, of_epoch, self.dataloader_idx, self.prog_bar, self.logger, metric)


class Label(NamedTuple):
    """What a rank that did not log a name must know of it.

    `metric` is the path in the module of a metric object, "" for one that is not there; None for numbers.
    """

    bare_name: str
    of_epoch: bool
    dataloader_idx: int | None
    prog_bar: bool
    logger: bool
    metric: str | None = None


def new_entry(hook: str, name: str, value: Any, flags: tuple[Any, ...], dataloader_idx: int | None) -> Entry:
    """The entry for the first call of `log` with this name in a hook; ConfigurationError for misuse."""
    prog_bar, logger, on_step, on_epoch, reduce_fx, add_dataloader_idx = flags
    if hook not in _LOGGING_HOOKS:
        raise ConfigurationError(
            f"log({name!r}) cannot be used in {hook or 'this place'}: it is in no step and no epoch. Log in "
            "training_step, validation_step, test_step or in the hooks around their batches and epochs."
        )
    if not isinstance(name, str) or "/dataloader_idx_" in name:
        raise ConfigurationError(f"log({name!r}): the name must be a string without '/dataloader_idx_', which we add.")
    if isinstance(value, Mapping):
        raise ConfigurationError(f"log({name!r}) got a {type(value).__name__}. Use log_dict for several values.")
    default_on_step, default_on_epoch, step_possible = _LOGGING_HOOKS[hook]
    if on_step and not step_possible:
        raise ConfigurationError(f"log({name!r}, on_step=True) cannot be used in {hook}. Use on_epoch=True.")
    on_step = default_on_step if on_step is None else on_step
    on_epoch = default_on_epoch if on_epoch is None else on_epoch
    if not on_step and not on_epoch:
        raise ConfigurationError(f"log({name!r}, on_step=False, on_epoch=False) logs nothing. Set one of the two.")
    op = _REDUCTIONS.get(getattr(reduce_fx, "__name__", reduce_fx))
    if op is None:
        raise ConfigurationError(f"log({name!r}, reduce_fx={reduce_fx!r}): use 'mean', 'sum', 'min' or 'max'.")
    with_index = add_dataloader_idx and dataloader_idx is not None
    return Entry(
        name=name,
        suffix=f"/dataloader_idx_{dataloader_idx}" if with_index else "",
        dataloader_idx=dataloader_idx,
        flags=flags,
        op=op,
        on_step=on_step,
        on_epoch=on_epoch,
        prog_bar=prog_bar,
        logger=logger is not False,
        metric=value if is_metric_object(value) else None,
    )


def host_number(name: str, value: Any) -> float:
    """`value` as a number of the host; ConfigurationError where it is none."""
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Tensor) and value.numel() != 1:
        raise no_number(name, value)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise no_number(name, value) from None


def no_number(name: str, value: Any) -> ConfigurationError:
    """The error for what is not a single number."""
    what = (
        f"a tensor of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"{value!r} ({type(value).__name__})"
    )
    return ConfigurationError(f"log({name!r}) got {what}. Log single numbers: value.mean(), value.sum(), float(value).")
