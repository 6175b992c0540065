"""Metrics that are objects: torchmetrics.Metric and whatever has its interface; torchmetrics is no dependency."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def is_metric_object(value: Any) -> bool:
    """True for a torchmetrics.Metric and for whatever has its interface."""
    return all(callable(getattr(value, name, None)) for name in ("update", "compute", "reset", "forward"))


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


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """States are tensors, changed in place, and lists, appended to."""
    return {
        name: value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value
        for name, value in attributes.items()
    }
