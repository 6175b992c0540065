"""Weights out of files that others wrote: for `load_from_checkpoint`.

`load_weights_of` reads a checkpoint of ours, a `.safetensors` file, or what `torch.save` wrote (Lightning's `.ckpt`,
a plain `.pt`). The last is a pickle; torch's weights-only reader builds tensors and plain containers from it and
calls nothing else. Classes that it does not know, which Lightning's hyper-parameters often hold, are replaced by
inert stand-ins, so that one odd hyper-parameter does not cost the weights; what was replaced is named in `left_out`.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from .load import load, read_safetensors
from .pointer import resolve_pointer
from .storage import Storage, storage_of


@dataclass
class Weights:
    """A state dict and the hyper-parameters beside it; `left_out` names those that could not be read.

    `extra` has the epoch, the step and the optimizers' states of a Lightning checkpoint, `read_state` reads all else
    that a checkpoint of ours holds.
    """

    state_dict: dict[str, Any]
    hyper_parameters: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    hparams_name: str | None = None
    init_names: list[str] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    read_state: Callable[[], Any] = dict


def load_weights_of(path: str | os.PathLike[str]) -> Weights:
    """The weights in a checkpoint folder, a `.safetensors` file, or a file of `torch.save`; nothing is executed."""
    place = resolve_pointer(path)
    storage, place = storage_of(place)
    if not storage.is_file(place):
        loaded = load(place)
        hyper_parameters = loaded.state_item("hyper_parameters")
        return Weights(
            loaded.model,
            hyper_parameters if isinstance(hyper_parameters, dict) else {},
            hparams_name=loaded.state_item("hparams_name"),
            init_names=loaded.state_item("hparams_init_names"),
            read_state=lambda: loaded.state,
        )
    if place.endswith(".safetensors"):
        return Weights(read_safetensors(storage, place))
    return _from_torch(place, *_unpickle(storage, place))


def _from_torch(path: str, content: Any, unread: Callable[[Any], bool]) -> Weights:
    """The weights in what `torch.save` wrote: Lightning's dict, or a state dict itself."""
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, expected a dict with 'state_dict', or a state dict."
        )
    state_dict = content.get("state_dict", content)
    if not isinstance(state_dict, dict) or not any(isinstance(value, Tensor) for value in state_dict.values()):
        keys = ", ".join(map(repr, list(content)[:10]))
        raise CheckpointError(
            f"{path} has no 'state_dict' and is none; its keys are {keys}. Save the state dict alone."
        )
    hyper_parameters = content.get("hyper_parameters") if state_dict is not content else None
    left_out: list[str] = []
    kept = _without(hyper_parameters, unread, "", left_out) if isinstance(hyper_parameters, dict) else {}
    name = content.get("hparams_name") if state_dict is not content else None
    extra = {key: content[key] for key in ("epoch", "global_step", "optimizer_states") if key in content}
    return Weights(
        dict(state_dict),
        kept,
        left_out,
        hparams_name=name,
        extra=extra if state_dict is not content else {},
    )


def _unpickle(storage: Storage, path: str) -> tuple[Any, Callable[[Any], bool]]:
    """What torch's weights-only reader makes of a file, and what tells whether a value in it could not be read."""
    replaced: dict[int, Any] = {}

    class Attributes(dict[str, Any]):
        def update(self, *_: Any, **__: Any) -> None:
            """Take what the reader gives the object to be restored from, which may be anything."""

    class StandIn:
        def __new__(cls, *_: Any, **__: Any) -> Any:
            made: OrderedDict[Any, Any] = OrderedDict()  # the reader fills nothing but plain dicts
            made.__dict__ = Attributes()
            replaced[id(made)] = made
            return made

    def unread(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(unread, value))
        if isinstance(value, dict):  # a stand-in that was filled was a dict of a class unknown here
            return (id(value) in replaced and not value) or any(map(unread, value.values()))
        return value is StandIn

    try:
        with io.BufferedReader(storage.open(path)) as file:  # type: ignore[type-var]  # IO[bytes] is as raw as it needs
            is_zip = file.peek(4)[:4] == b"PK\x03\x04"
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file) if is_zip else []
            file.seek(0)
            with torch.serialization.safe_globals([(StandIn, name) for name in unknown]):
                return torch.load(file, map_location="cpu", weights_only=True), unread
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        EOFError,
    ) as error:
        told = (
            str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        )  # torch's advice is not ours
        raise CheckpointError(
            f"{path} cannot be read as weights without executing what is in it ({type(error).__name__}: {told:.200}). "
            "Save its state dict as .safetensors where its code is at hand and trusted."
        ) from error


def _without(value: dict[Any, Any], unread: Callable[[Any], bool], path: str, left_out: list[str]) -> dict[Any, Any]:
    """`value` without what could not be read; the innermost dict's key is what is left out."""
    kept = {}
    for key, item in value.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(item, dict) and item:
            kept[key] = _without(item, unread, name, left_out)
        elif unread(item):
            left_out.append(name)
        else:
            kept[key] = item
    return kept
