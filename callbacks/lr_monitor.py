"""`LearningRateMonitor`: learning rates (momenta, weight decays) in the points of everything else that is logged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigurationError
from ..trainer.argument_types import checked_types
from ..trainer.callback import Callback
from ..trainer.optimizer_handle import bare
from .logger import logs_this_update, require_logger

if TYPE_CHECKING:
    from ..trainer.module import Module
    from ..trainer.optim import SchedulerConfig
    from ..trainer.trainer import Trainer


class LearningRateMonitor(Callback):
    """Logs the learning rate that each logged update used, under `lr-Adam`, `lr-Adam/pg1`, or the scheduler's `name`.

    `logging_interval` "step" logs with the points of training, "epoch" with those of its epochs, None each rate as its
    scheduler steps (without a scheduler: "step"). `-momentum` and `-weight_decay` are added to the names of those.
    `lrs` keeps what was logged: names → lists.
    """

    @checked_types
    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise ConfigurationError(f"logging_interval={logging_interval!r}: use 'step', 'epoch' or None.")
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.lrs: dict[str, list[Any]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        require_logger(self, trainer)
        self.lrs = {named.name: [] for named in named_param_groups(trainer.optimizers, trainer.lr_scheduler_configs)}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        if self.logging_interval != "epoch" and logs_this_update(trainer):
            self._log(trainer, "step", on_step=True, on_epoch=False)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self.logging_interval != "step":
            self._log(trainer, "epoch", on_step=False, on_epoch=True)

    def _log(self, trainer: Trainer, interval: str, on_step: bool, on_epoch: bool) -> None:
        for named in named_param_groups(trainer.optimizers, trainer.lr_scheduler_configs):
            if self.logging_interval is None and (named.interval or "step") != interval:
                continue
            values = self._values(named)
            for name, value in values.items():
                self.log(name, value, on_step=on_step, on_epoch=on_epoch, batch_size=1)
            rate = values[named.name]
            self.lrs.setdefault(named.name, []).append(rate.clone() if isinstance(rate, Tensor) else rate)

    def _values(self, named: NamedGroup) -> dict[str, Any]:
        group = named.group
        values = {named.name: group["lr"]}  # a tensor for capturable optimizers: never read back here
        if self.log_momentum:
            values[f"{named.name}-momentum"] = group["betas"][0] if "betas" in group else group.get("momentum", 0.0)
        if self.log_weight_decay:
            values[f"{named.name}-weight_decay"] = group.get("weight_decay", 0.0)
        return values


@dataclass(frozen=True)
class NamedGroup:
    """A parameter group under the name that its learning rate is logged with."""

    name: str
    group: dict[str, Any]
    interval: str | None  # its scheduler's; None: the optimizer has none


def named_param_groups(optimizers: Sequence[Optimizer], configs: Sequence[SchedulerConfig]) -> list[NamedGroup]:
    """All parameter groups, those of schedulers first, then those of optimizers without one.

    Names are the scheduler's `name`, or `lr-Adam`, `lr-Adam-1` for the second of that class; with several groups (or
    named ones) `/pg1`, `/pg2` or `/name` follows. Raises ConfigurationError for equal group names in one optimizer.
    """
    sources: list[tuple[Optimizer, SchedulerConfig | None]] = []
    for config in configs:
        scheduled = getattr(config.scheduler, "optimizer", None)
        if isinstance(scheduled, Optimizer):
            sources.append((bare(scheduled), config))
    sources += [(o, None) for o in map(bare, optimizers) if not any(o is other for other, _ in sources)]
    seen: dict[str, int] = {}
    named: list[NamedGroup] = []
    for optimizer, source in sources:
        stem = source.name if source is not None else None
        if stem is None:
            kind = type(optimizer).__name__
            repeats = seen[kind] = seen.get(kind, -1) + 1
            stem = f"lr-{kind}-{repeats}" if repeats else f"lr-{kind}"
        interval = source.interval if source is not None else None
        names = _group_names(stem, optimizer.param_groups)
        named += [NamedGroup(name, group, interval) for name, group in zip(names, optimizer.param_groups, strict=True)]
    return named


def _group_names(stem: str, groups: list[dict[str, Any]]) -> list[str]:
    given = [group["name"] for group in groups if "name" in group]
    twice = sorted({str(name) for name in given if given.count(name) > 1})
    if twice:
        raise ConfigurationError(
            f"{stem} has several parameter groups with the names {twice}. Give each group of an optimizer its own."
        )
    if len(groups) == 1 and not given:
        return [stem]
    return [f"{stem}/{group.get('name', f'pg{number}')}" for number, group in enumerate(groups, 1)]
