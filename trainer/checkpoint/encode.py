"""Python values as JSON and tensors: what `state_dict()` gives goes in, an equal value comes out.

`encode` walks a tree once and hands its tensors out under the path where they were found; `decode` is its inverse.
JSON knows None, bool, int, float, str, lists, and dicts with text keys. The rest of what is kept carries a tag:

    (1, 2)                  {"$tuple": [1, 2]}
    {7: "x"}                {"$dict": [[7, "x"]]}       also dicts with a text key that begins with "$"
    float("inf")            {"$float": "inf"}           inf, -inf, nan
    a torch.Tensor          {"$tensor": "ema.weight"}
    a NumPy array, scalar   {"$tensor": "history", "numpy": "array"}

The surprise: subclasses are refused (but those of dict, which load as dict), since they would come back as something
else. A named tuple, an Enum, a torch.Size are one explicit conversion away, and the error says which.
"""

from __future__ import annotations

import enum
import math
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from .tensors import why_not_storable

MAX_DEPTH = 100  # deeper is a cycle on the way out and an attack on the way in
_LONGEST_INT_BITS = 8192  # Python itself refuses to read integers of more than 4300 digits
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

# A path is rendered only for tensors and errors, so that a thousand numbers cost no thousand strings.
_Path = tuple[Any, "str | int"]


def encode(tree: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """The JSON value of `tree` and its tensors by name; tensors are neither copied nor moved.

    `path` is the name of the tree's root in errors and in the names of tensors.
    Raises CheckpointError for a value that cannot be stored, naming its path, its type and what to do.
    """
    encoder = _Encoder()
    return encoder.value(tree, (None, path), 0), encoder.tensors


def decode(value: Any, tensors: Mapping[str, Tensor], path: str = "") -> Any:
    """The tree that `encode` took apart; raises CheckpointError for what it cannot have written."""
    return _decode(value, tensors, (None, path), 0)


def tensor_names(value: Any) -> Iterator[str]:
    """The names of all tensors that `decode` would look up for this JSON value."""
    unseen = [value]
    while unseen:
        value = unseen.pop()
        if type(value) is dict:
            name = value.get("$tensor")
            if type(name) is str:
                yield name
            unseen.extend(value.values())
        elif type(value) is list:
            unseen.extend(value)


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def value(self, value: Any, path: _Path, depth: int) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            if value.bit_length() > _LONGEST_INT_BITS:
                raise CheckpointError(f"{_render(path)} is an integer of {value.bit_length()} bits; store it as text.")
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, Tensor):
            return {"$tensor": self.keep(value, path)}
        if depth >= MAX_DEPTH:
            raise CheckpointError(
                f"{_render(path)[:200]} is nested deeper than {MAX_DEPTH} levels: it contains itself or is too deep."
            )
        if kind is list:
            return [self.value(item, (path, i), depth + 1) for i, item in enumerate(value)]
        if kind is tuple:
            return {"$tuple": [self.value(item, (path, i), depth + 1) for i, item in enumerate(value)]}
        if isinstance(value, dict):
            return self.dictionary(value, path, depth + 1)
        return self.numpy(value, path)

    def dictionary(self, value: dict[Any, Any], path: _Path, depth: int) -> Any:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.value(item, (path, key), depth) for key, item in value.items()}
        return {
            "$dict": [
                [self.key(key, path), self.value(item, (path, key if type(key) is str else f"[{key!r}]"), depth)]
                for key, item in value.items()
            ]
        }

    def key(self, key: Any, path: _Path) -> Any:
        if type(key) is tuple:
            return {"$tuple": [self.key(item, path) for item in key]}
        if type(key) in (type(None), bool, int, float, str):
            return self.value(key, path, 0)
        raise CheckpointError(
            f"{_render(path)} has the key {key!r:.80} of type {_name(type(key))}. Keys can be text, numbers, None, or "
            f"tuples of these; use such a key."
        )

    def numpy(self, value: Any, path: _Path) -> Any:
        numpy = sys.modules.get("numpy")  # a NumPy value means that NumPy is imported
        if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)):
            raise _refusal(value, path)
        if isinstance(value, numpy.str_):
            return str(value)
        if type(value) not in (numpy.ndarray, numpy.memmap) and not isinstance(value, numpy.generic):
            raise _refusal(value, path)
        if value.dtype.kind not in "biufc" or value.dtype.itemsize > 16 or value.dtype.char in "gG":
            raise CheckpointError(
                f"{_render(path)} is a NumPy value of dtype {value.dtype}, which has no tensor type. Convert it to "
                f"numbers or to a list of text."
            )
        array = numpy.asarray(value).astype(value.dtype.newbyteorder("="), order="C", copy=False)
        if not array.flags.writeable or min(array.strides, default=0) < 0:  # torch refuses these
            array = array.copy()
        form = "scalar" if isinstance(value, numpy.generic) else "array"
        return {"$tensor": self.keep(torch.from_numpy(array), path), "numpy": form}

    def keep(self, tensor: Tensor, path: _Path) -> str:
        reason = why_not_storable(tensor)
        if reason is not None:
            raise CheckpointError(f"{_render(path)} is a tensor that {reason}")
        stem = _render(path).encode("utf-8", "backslashreplace").decode()
        name, repeat = stem, 1
        while name in self.tensors or name == "__metadata__":  # {"a.b": x} and {"a": {"b": y}} have one path
            repeat += 1
            name = f"{stem}~{repeat}"
        self.tensors[name] = tensor
        return name


def _decode(value: Any, tensors: Mapping[str, Tensor], path: _Path, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{_render(path)[:200]} is nested deeper than {MAX_DEPTH} levels.")
    if type(value) is list:
        return [_decode(item, tensors, (path, i), depth + 1) for i, item in enumerate(value)]
    if type(value) is not dict:
        return value
    if not any(key.startswith("$") for key in value):
        return {key: _decode(item, tensors, (path, key), depth + 1) for key, item in value.items()}
    tag, content = next(iter(value.items()))
    if tag == "$tensor" and type(content) is str and set(value) <= {"$tensor", "numpy"}:
        return _decode_tensor(content, value.get("numpy"), tensors, path)
    if len(value) == 1 and tag == "$float" and type(content) is str and content in _FLOATS:
        return _FLOATS[content]
    if len(value) == 1 and tag == "$tuple" and type(content) is list:
        return tuple(_decode(item, tensors, (path, i), depth + 1) for i, item in enumerate(content))
    if len(value) == 1 and tag == "$dict" and _is_pairs(content):
        pairs = ((_decode_key(key, path, depth), item) for key, item in content)
        return {key: _decode(item, tensors, (path, f"[{key!r}]"), depth + 1) for key, item in pairs}
    raise CheckpointError(f"{_render(path)} holds {tag!r} in a form that no save writes.")


def _is_pairs(content: Any) -> bool:
    return type(content) is list and all(type(pair) is list and len(pair) == 2 for pair in content)


def _decode_key(key: Any, path: _Path, depth: int) -> Any:
    key = _decode(key, {}, path, depth + 1)
    try:
        hash(key)
    except TypeError as error:
        raise CheckpointError(
            f"{_render(path)} has a key of type {_name(type(key))}, which no dict can have."
        ) from error
    return key


def _decode_tensor(name: str, form: Any, tensors: Mapping[str, Tensor], path: _Path) -> Any:
    if name not in tensors:
        raise CheckpointError(f"{_render(path)} refers to the tensor {name!r}, which is not in the checkpoint.")
    tensor = tensors[name]
    if form is None:
        return tensor
    try:
        array = tensor.cpu().numpy()
    except (ImportError, RuntimeError, TypeError) as error:  # torch raises RuntimeError where NumPy is missing
        raise CheckpointError(f"{_render(path)} is a NumPy value and cannot be made: {error}.") from error
    if form == "array":
        return array
    if form == "scalar" and array.ndim == 0:
        return array[()]
    raise CheckpointError(f"{_render(path)} is marked as a NumPy {form!r:.80}, which no save writes.")


def _refusal(value: Any, path: _Path) -> CheckpointError:
    return CheckpointError(
        f"{_render(path)} is of type {_name(type(value))}, which a checkpoint cannot hold: {_advice(value)}. "
        f"It holds None, bool, int, float, str, list, tuple, dict, tensors, and NumPy arrays and numbers."
    )


#: What to store in the place of a value, by its type; the first that fits.
_ADVICE: tuple[tuple[Any, str], ...] = (
    (enum.Enum, "store its .value or .name"),
    ((set, frozenset), "store sorted(...) of it as a list"),
    ((bytes, bytearray, memoryview), "store text, or a uint8 tensor"),
    ((os.PathLike, torch.dtype, torch.device), "store str(...) of it"),
    (complex, "store its real and imaginary parts"),
    (torch.Generator, "store its get_state()"),
    *((kind, f"store {kind.__name__}(...) of it") for kind in (tuple, str, int, float, list)),
)


def _advice(value: Any) -> str:
    """What to store in the place of `value`."""
    if advice := next((advice for kind, advice in _ADVICE if isinstance(value, kind)), None):
        return advice
    if hasattr(value, "state_dict"):
        return "store its state_dict()"
    anew = "make it anew when the state is loaded"
    return f"leave it out, and {anew}" if callable(value) else f"store plain values made from it, and {anew}"


def _render(path: _Path) -> str:
    parts = []
    parent: Any = path
    while parent is not None:
        parent, part = parent
        parts.append(f"[{part}]" if isinstance(part, int) else part)
    text = ""
    for part in reversed(parts):
        text += part if part.startswith("[") or not text else f".{part}"
    return text or "the state"


def _name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
