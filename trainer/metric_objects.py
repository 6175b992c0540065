"""Metrics that are objects: torchmetrics.Metric and whatever has its interface; torchmetrics is no dependency."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..strategies.base import Strategy

#: For each part of a metric, whether this rank fed it, and its states.
_Fed = list[tuple[bool, dict[str, Any]]]


def is_metric_object(value: Any) -> bool:
    """True for a torchmetrics.Metric and for whatever has its interface."""
    return all(callable(getattr(value, name, None)) for name in ("update", "compute", "reset", "forward"))


def path_of(metric: Any, module: nn.Module | None) -> str:
    """Where `metric` is in `module`, for `module.get_submodule`; "" where it is not."""
    return "" if module is None else next((path for path, part in module.named_modules() if part is metric), "")


def compute_all(metrics: Mapping[str, Any], strategy: Strategy) -> dict[str, Any]:
    """`compute()` of each over what all ranks fed it; afterwards its states are this rank's own again. One collective.

    torchmetrics' own way would wait for ever where a rank had no batch, or another number of them.
    """
    if strategy.world_size == 1:
        return {name: metric.compute() for name, metric in metrics.items()}
    mine = {name: _fed_states(metric) for name, metric in metrics.items() if hasattr(metric, "_reductions")}
    shares = strategy.all_gather_object(mine) if mine else []
    return {
        name: _compute_merged(metric, mine[name], [share[name] for share in shares])
        if name in mine
        else metric.compute()
        for name, metric in metrics.items()
    }


def _parts(metric: Any) -> list[Any]:
    """The metric and those that it is made of."""
    return [part for part in metric.modules() if hasattr(part, "_reductions")]


def _fed_states(metric: Any) -> _Fed:
    return [
        (part._update_count > 0, {name: _on_cpu(getattr(part, name)) for name in part._reductions})
        for part in _parts(metric)
    ]


def _compute_merged(metric: Any, mine: _Fed, shares: list[_Fed]) -> Any:
    parts = _parts(metric)
    before = [dict(vars(part)) for part in parts]
    for number, part in enumerate(parts):
        fed = [states for was_fed, states in (share[number] for share in shares) if was_fed] or [mine[number][1]]
        for name, reduction in part._reductions.items():
            setattr(part, name, _merged([states[name] for states in fed], reduction, part.device))
        part._to_sync, part._computed, part._update_count = False, None, max(part._update_count, 1)
    try:
        return metric.compute()
    finally:
        for part, attributes in zip(parts, before, strict=True):
            vars(part).update(attributes)


def _merged(states: list[Any], reduction: Callable[[Tensor], Any] | None, device: torch.device) -> Any:
    """One state of several ranks: lists in the order of one process, tensors by the metric's own reduction."""
    if any(isinstance(state, list) for state in states):
        lists = [state if isinstance(state, list) else [state] for state in states]
        rounds = zip_longest(*lists)  # batch i was rank i mod n's
        return [item.to(device) for one_round in rounds for item in one_round if item is not None]
    if len(states) == 1:
        return states[0].to(device)
    stacked = torch.stack(states).to(device)
    return stacked if reduction is None else reduction(stacked)


def _on_cpu(state: Any) -> Any:
    """A state as it can be sent to another rank."""
    return [item.cpu() for item in state] if isinstance(state, list) else state.cpu()


def metric_states(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The states of the metric objects of `module`, by path: an epoch's half-done counts."""
    return {
        path: {
            name: value for name, value in _copied(vars(metric)).items() if name in (*metric._defaults, "_update_count")
        }
        for path, metric in module.named_modules()
        if is_metric_object(metric) and hasattr(metric, "_defaults")
    }


def load_metric_states(module: nn.Module, states: dict[str, dict[str, Any]]) -> None:
    """Put back what `metric_states` gave."""
    for path, state in states.items():
        metric = module.get_submodule(path)
        for name, value in state.items():
            before = getattr(metric, name)
            moves = isinstance(value, Tensor) and isinstance(before, Tensor)
            setattr(metric, name, value.to(before.device) if moves else value)


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Whatever the body feeds to the metric objects of `module` is forgotten: its batch counts for nothing."""
    held = [(metric, _copied(vars(metric))) for metric in module.modules() if is_metric_object(metric)]
    try:
        yield
    finally:
        for metric, before in held:
            vars(metric).update(before)


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Whatever the body does to the buffers of `module`, as batch statistics, is undone, behind autograd's back."""
    held = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, before in held:
            buffer.data.copy_(before)  # autograd may have saved the buffer; what goes backward is multiplied by zero


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Every layer gets its mode (training or evaluation) back afterwards."""
    held = [(layer, layer.training) for layer in module.modules()]
    try:
        yield
    finally:
        for layer, training in held:
            layer.training = training


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """States are tensors, changed in place, and lists, appended to."""
    return {
        name: value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value
        for name, value in attributes.items()
    }
