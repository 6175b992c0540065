"""A `Window`: the micro-batches of one optimizer step on this rank, and the factors of their losses.

`shares` is the one owner of the arithmetic that makes the gradient of many micro-batches that of one big batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from ..strategies.base import Strategy

#: Host batches in, device batches out, perhaps some ahead.
ToDevice = Callable[[Iterator[Any]], Iterator[Any]]

_LEAST_TOTAL = 1e-30  # far below any sum of weights, and its inverse times the number of ranks is finite in float32


@dataclass(slots=True)
class Window:
    """The micro-batches of one optimizer step on this rank.

    `batches` yields at least `len(scales)` batches; `scales` are the factors of their mean losses (a number, or a 0-d
    device tensor), `weights` how much each counts (None: found from the batch when asked for); `samples` are those of
    all ranks. The last `ghosts` micro-batches are repeated ones, run only to keep up with the other ranks.
    """

    batches: Iterator[Any]
    scales: Sequence[float | Tensor]
    weights: Sequence[float | None]
    samples: int
    ghosts: int = 0


@dataclass
class DataSettings:
    """What the cut of the data depends on. `accumulate` may be changed between epochs, from what was `asked`."""

    seed: int
    accumulate: int = 1
    asked: int = 1
    global_batch_size: int | None = None
    limit: int | float | None = None
    loss_weight: Callable[[Any], float | Tensor] | None = None
    take_over: bool = True
    overfit: int | float = 0


def weight_of(batch: Any, loss_weight: Callable[[Any], float | Tensor]) -> float:
    """What a user's `loss_weight` says of a batch; ConfigurationError where that is no number of items."""
    said = loss_weight(batch)
    try:
        weight = float(said)
    except (TypeError, ValueError, RuntimeError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise ConfigurationError(
            f"loss_weight returned {said!r:.80} ({type(said).__name__}). Return how many items the mean loss of the "
            "batch stands for: one number, or a 0-d tensor, that is 0 or more."
        )
    return weight


def shares(weights: Sequence[float], strategy: Strategy) -> Sequence[float | Tensor]:
    """Factors that make the window's gradient, as the strategy reduces it over the ranks, that of its weighted mean.

    weight / (sum of all ranks' weights) * the strategy's `gradient_divisor`; with several ranks one reduction on the
    device, and no host sync.
    """
    total = sum(weights)
    if strategy.data_ranks == 1:
        return [w / total if total else 0.0 for w in weights]
    dtype = torch.float64 if strategy.device.type == "cpu" else torch.float32
    over_ranks = strategy.all_reduce(torch.full((), total, dtype=dtype, device=strategy.device))
    inverse = strategy.gradient_divisor / over_ranks.clamp(min=_LEAST_TOTAL)
    return [inverse * w for w in weights]


def moved(batches: list[Any], to_device: ToDevice | None) -> Iterator[Any]:
    """The batches of one window, on the device."""
    return iter(batches) if to_device is None else to_device(iter(batches))
