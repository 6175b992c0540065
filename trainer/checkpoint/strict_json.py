"""JSON as checkpoints hold it: written in one way, read with nothing taken on trust.

`write_json` and `read_json` replace the `json` module here; `take` and its kin read one field and refuse a wrong type,
naming the file. A file that is no JSON is described by what it seems to be, since a pickle is the usual surprise.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from ...errors import CheckpointError

MANIFEST_LIMIT_BYTES = 64 * 2**20
TREE_LIMIT_BYTES = 256 * 2**20  # index.json and state.json: some hundred bytes a tensor

_T = TypeVar("_T")
_LARGEST = 2**63 - 1


def write_json(value: Any, name: str = "", limit: int = TREE_LIMIT_BYTES) -> bytes:
    """The bytes of `value`; the same value always gives the same bytes. More than a reader takes are refused."""
    # ASCII, because lone surrogates, which Python strings may hold, have no UTF-8.
    data = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    if len(data) > limit:
        raise CheckpointError(
            f"{name} would have {len(data)} bytes, the limit is {limit}. Store long lists of numbers as tensors."
        )
    return data


def read_json(data: bytes, where: str) -> Any:
    """The value in `data`; `where` names the file in the error."""
    try:
        return json.loads(data, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is no readable JSON{looks_like(data)}: {error}.") from error


def looks_like(head: bytes) -> str:
    """What a file that is not what it should be seems to be, as a part of a sentence; empty if nothing known."""
    if head.startswith(b"PK\x03\x04"):
        return " (it looks like a zip archive, as torch.save writes)"
    if head[:1] == b"\x80" and head[1:2] in b"\x01\x02\x03\x04\x05":
        return " (it looks like a pickle)"
    return ""


def take(record: Any, key: str, kind: type[_T], where: str) -> _T:
    """`record[key]`, which must be exactly of type `kind`."""
    if type(record) is not dict:
        raise CheckpointError(f"{where} is {short(record)}, expected an object with {key!r}.")
    value = record.get(key)
    if type(value) is not kind:
        raise CheckpointError(f"{where}: {key!r} is {short(value)}, expected {kind.__name__}.")
    return value


def take_count(record: Any, key: str, where: str) -> int:
    """`record[key]`, a whole number from 0 to 2**63 - 1."""
    return _count(take(record, key, int, where), key, where)


def take_counts(record: Any, key: str, where: str, at_most: int) -> tuple[int, ...]:
    """`record[key]`, a list of at most so many whole numbers from 0 to 2**63 - 1."""
    values = take(record, key, list, where)
    if len(values) > at_most:
        raise CheckpointError(f"{where}: {key!r} has {len(values)} entries, expected at most {at_most}.")
    return tuple(_count(value, key, where) for value in values)


def short(value: Any) -> str:
    """`value` for an error message."""
    text = repr(value) if isinstance(value, (str, int, float, type(None))) else f"of type {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _count(value: Any, key: str, where: str) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise CheckpointError(f"{where}: {key!r} holds {short(value)}, expected a whole number from 0 to 2**63 - 1.")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("an object has the same key twice")
    return record


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no JSON")
