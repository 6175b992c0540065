"""Parameter groups that join an optimizer while it trains, and the schedulers that were made before them.

torch's schedulers keep lists with an entry for each group that there was, and fail when there are more. A group that
joins, or is given another rate, goes on from that rate as the first group goes on from its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ..trainer.optim import SchedulerConfig

#: What schedulers keep for each group: rates, which stand to each other as the groups' rates do, and other things.
_RATES = ("base_lrs", "max_lrs")
_OTHERS = ("lr_lambdas", "min_lrs", "base_momentums", "max_momentums")
#: What schedulers keep in the groups themselves.
_RATES_OF_GROUP = ("initial_lr", "max_lr", "min_lr")
_OTHERS_OF_GROUP = ("base_momentum", "max_momentum", "swa_lr")


def let_schedulers_follow(
    configs: Iterable[SchedulerConfig], optimizer: Optimizer, rates_before: Sequence[Any]
) -> None:
    """Make the schedulers of `optimizer` go on from its groups' present rates; `rates_before` are the earlier ones."""
    groups = optimizer.param_groups
    changed = [i for i in range(1, len(groups)) if i >= len(rates_before) or groups[i]["lr"] != rates_before[i]]
    schedulers = [s for config in configs for s in _with_inner(config.scheduler) if s.optimizer is optimizer]
    if not changed or not schedulers:
        return
    for i in changed:
        factor = groups[i]["lr"] / groups[0]["lr"] if groups[0]["lr"] else 1.0
        for key in _RATES_OF_GROUP:
            if key in groups[0]:
                groups[i][key] = groups[0][key] * factor
        for key in _OTHERS_OF_GROUP:
            if key in groups[0]:
                groups[i].setdefault(key, groups[0][key])
        for scheduler in schedulers:
            for name in _RATES:
                _set(scheduler, name, i, factor)
            for name in _OTHERS:
                _set(scheduler, name, i, None)
    for scheduler in schedulers:
        scheduler._last_lr = [group["lr"] for group in groups]


def _set(scheduler: Any, name: str, index: int, factor: float | None) -> None:
    """Entry `index` of a scheduler's list, where it has one: that of the first group, times `factor`."""
    entries = getattr(scheduler, name, None)
    if not isinstance(entries, list) or not entries:
        return
    value = entries[0] if factor is None else entries[0] * factor
    if index < len(entries):
        entries[index] = entries[index] if factor is None else value
    else:
        entries.append(value)


def _with_inner(scheduler: Any) -> Iterator[Any]:
    """The scheduler, and those that it is made of (SequentialLR, ChainedScheduler)."""
    if hasattr(scheduler, "optimizer"):
        yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _with_inner(inner)
