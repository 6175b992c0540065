"""Optimizer state by parameter name, so that it outlives the order in which parameters happen to be listed.

`optimizer_state_by_name` turns what `Optimizer.state_dict()` numbers into names; `load_optimizer_state_by_name` goes
back. Neither calls `step()`. How an optimizer computes (`fused`, `foreach`, `capturable`, `differentiable`) is taken
from the optimizer that loads, what it computes (rates, decays) from the checkpoint.

The surprise: torch's own loading casts all state to the parameter's dtype; here every tensor keeps the dtype it was
saved in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...errors import CheckpointError
from .boxes import is_sharded

_HOW = ("foreach", "fused", "capturable", "differentiable")


def optimizer_state_by_name(optimizer: Optimizer, names: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state of `optimizer` as a tree to save; `names` are the model's named parameters.

    The tree holds the optimizer's own tensors, not copies. Raises CheckpointError for a parameter without a name.
    """
    groups = _named_groups(optimizer, names)
    packed = optimizer.state_dict()
    order = [name for group in groups for name in group]
    state: dict[str, Any] = {}
    other: dict[str, Any] = {}
    for key, value in packed["state"].items():
        if isinstance(key, int):
            state[order[key]] = value
            _check_shared(type(optimizer).__name__, order[key], value, names[order[key]])
        elif isinstance(key, str):
            other[key] = value
        else:
            raise CheckpointError(
                f"{type(optimizer).__name__} keeps state under the key {key!r:.80}, which is no parameter of its "
                f"groups and no text. Use text keys for state that belongs to no parameter."
            )
    options = [
        {k: v for k, v in group.items() if k not in ("params", "param_names")} for group in packed["param_groups"]
    ]
    return {
        "optimizer": type(optimizer).__name__,
        "groups": [{"params": group, "options": option} for group, option in zip(groups, options, strict=True)],
        "state": state,
        "other": other,
    }


def _check_shared(kind: str, name: str, state: Any, parameter: Tensor) -> None:
    """CheckpointError for state that each rank has for itself of a parameter that they share."""
    if not is_sharded(parameter) or not isinstance(state, Mapping):
        return
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel() > 1 and not is_sharded(value):
            raise CheckpointError(
                f"{kind} keeps {key!r:.80} of {name!r:.200} as a tensor of shape {list(value.shape)} of each rank's "
                f"own, while the parameter is one of shape {list(parameter.shape)} in shards: it cannot be saved. "
                "Use an optimizer that makes its state from the parameter, as AdamW does, or strategy='ddp'."
            )


def load_optimizer_state_by_name(optimizer: Optimizer, tree: Mapping[str, Any], names: Mapping[str, Tensor]) -> None:
    """Put the tree that `optimizer_state_by_name` gave into `optimizer`, each tensor on its parameter's device.

    Raises CheckpointError, changing nothing, if the groups or the parameters in them are not those that were saved.
    """
    groups = _named_groups(optimizer, names)
    _check(optimizer, groups, tree)
    number = {name: i for i, name in enumerate(name for group in groups for name in group)}
    options = [
        _options(saved["options"], current)
        for saved, current in zip(tree["groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict(
        {
            "state": {**{number[name]: value for name, value in tree["state"].items()}, **tree["other"]},
            "param_groups": [
                {**option, "params": [number[name] for name in group]}
                for option, group in zip(options, groups, strict=True)
            ],
        }
    )
    if type(optimizer).load_state_dict is Optimizer.load_state_dict:  # an optimizer that loads in its own way knows why
        _keep_dtypes(optimizer, tree["state"], names)


def _named_groups(optimizer: Optimizer, names: Mapping[str, Tensor]) -> list[list[str]]:
    by_id: dict[int, str] = {}
    for name, parameter in names.items():
        by_id.setdefault(id(parameter), name)  # tied parameters go by their first name
    groups = [[by_id.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
    for i, group in enumerate(groups):
        for j, found in enumerate(group):
            if found is None:
                shape = list(optimizer.param_groups[i]["params"][j].shape)
                raise CheckpointError(
                    f"parameter {j} of group {i} of {type(optimizer).__name__}, of shape {shape}, is no parameter of "
                    f"the module, so that its state has no name. Register it on the module."
                )
    return [[name for name in group if name is not None] for group in groups]


def _check(optimizer: Optimizer, groups: list[list[str]], tree: Mapping[str, Any]) -> None:
    kind = type(optimizer).__name__
    try:
        saved_groups = [list(group["params"]) for group in tree["groups"]]
        saved_options = [set(group["options"]) for group in tree["groups"]]
        saved_kind, _, _ = tree["optimizer"], tree["state"].items(), tree["other"].items()
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the saved optimizer state is not what a save writes ({error!r}).") from error
    if saved_kind != kind and any(options - set(optimizer.defaults) - {"initial_lr"} for options in saved_options):
        raise CheckpointError(
            f"the optimizer state was saved by {saved_kind} and the optimizer is now {kind}. Use {saved_kind}, or "
            f"start from the weights alone."
        )
    if len(saved_groups) != len(groups):
        raise CheckpointError(
            f"{kind} has {len(groups)} parameter groups and was saved with {len(saved_groups)}. Configure the same "
            f"groups; those that a callback added during the run must be added before the state is loaded."
        )
    place = {name: i for i, group in enumerate(groups) for name in group}
    for i, saved in enumerate(saved_groups):
        for name in saved:
            if place.get(name) != i:
                now = "is in none" if name not in place else f"is now in group {place[name]}"
                raise CheckpointError(
                    f"parameter {name!r:.200} was saved in group {i} of {kind} and {now}. Rename it back or configure "
                    f"the same groups, or start from the weights alone."
                )
    known = {name for saved in saved_groups for name in saved}
    for i, group in enumerate(groups):
        for name in group:
            if name not in known:
                raise CheckpointError(
                    f"parameter {name!r:.200} is in group {i} of {kind}, but was not when the checkpoint was saved. "
                    f"Take it out of the optimizer, or start from the weights alone."
                )
    for name in tree["state"]:
        if name not in place:
            raise CheckpointError(
                f"the checkpoint has optimizer state of {name!r:.200}, which is in no group of {kind}."
            )
    if isinstance(optimizer, torch.optim.LBFGS) and saved_groups != groups:
        raise CheckpointError(
            "LBFGS keeps all parameters in one vector, and their order is not the saved one. Restore it."
        )


def _options(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options to load: the saved ones, but how to compute as it is now, and a tensor where one is now."""
    options = {k: v for k, v in current.items() if k not in ("params", "param_names")}
    for key, value in saved.items():
        if key in _HOW and key in current:
            continue
        was = current.get(key)
        if isinstance(was, Tensor):
            value = torch.as_tensor(value, dtype=was.dtype, device=was.device)
        elif isinstance(value, Tensor) and isinstance(was, float):
            value = value.item()
        options[key] = value
    return options


def _keep_dtypes(optimizer: Optimizer, state: Mapping[str, Any], names: Mapping[str, Tensor]) -> None:
    for group in optimizer.param_groups:
        by_id = {id(parameter): parameter for parameter in group["params"]}
        on_device = bool(group.get("fused")) or bool(group.get("capturable"))
        for name, value in state.items():
            parameter = by_id.get(id(names[name]))
            if parameter is not None:
                optimizer.state[parameter] = _placed(value, parameter, on_device, None)


def _placed(value: Any, parameter: Tensor, on_device: bool, key: object) -> Any:
    """`value` with its tensors on the parameter's device, but for `step`, which only some optimizers want there."""
    if isinstance(value, Tensor):
        if key != "step":
            return value.to(parameter.device)
        return value.to(parameter.device, torch.float32) if on_device else value.cpu()
    if isinstance(value, dict):
        return {k: _placed(v, parameter, on_device, k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_placed(v, parameter, on_device, None) for v in value])
    return value
