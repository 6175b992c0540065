"""What loggers do to values before they write them: plain numbers, plain hyper-parameters, prefixed names."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Mapping
from typing import Any


def plain_number(value: Any) -> Any:
    """`value` as a Python number where it is a tensor or a NumPy scalar (host sync); anything else as it is."""
    if isinstance(value, (int, float, str)) or value is None:
        return value
    item = getattr(value, "item", None)
    return item() if callable(item) else value


def add_prefix(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """`metrics` with `prefix-` before each name; an empty prefix changes nothing."""
    return {f"{prefix}-{name}": value for name, value in metrics.items()} if prefix else dict(metrics)


def hparams_dict(params: Any) -> dict[str, Any]:
    """Hyper-parameters given as a dict, a Namespace, or None, as a dict."""
    if params is None:
        return {}
    return dict(vars(params) if isinstance(params, Namespace) else params)


def flatten(params: Mapping[Any, Any], joint: str = "/") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a/b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        value = vars(value) if isinstance(value, Namespace) else value
        if isinstance(value, Mapping) and value:
            flat.update((f"{key}{joint}{inner}", leaf) for inner, leaf in flatten(value, joint).items())
        else:
            flat[str(key)] = value
    return flat


def jsonable(value: Any) -> Any:
    """`value` in what JSON has.

    Non-finite floats become the strings "NaN", "Infinity" and "-Infinity", which `float()` takes back; what JSON
    lacks altogether becomes its `str`.
    """
    value = plain_number(value) if getattr(value, "ndim", None) == 0 else value
    if isinstance(value, float):
        return value if math.isfinite(value) else json.dumps(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(inner) for inner in value]
    return str(value)


def as_yaml(hparams: Mapping[str, Any]) -> str:
    """The text of a `hparams.yaml`, which `load_from_checkpoint(hparams_file=)` reads."""
    import yaml

    text: str = yaml.safe_dump(jsonable(hparams), sort_keys=False, allow_unicode=True)
    return text
