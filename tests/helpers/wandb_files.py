"""`read_offline_run`: what an offline run of wandb wrote, read from its `.wandb` file.

The file is a LevelDB log (7 bytes of header, then blocks of 32 KiB with records that may be cut at their ends) of
wandb's own protobuf messages.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FILE_HEADER, _BLOCK, _RECORD_HEADER = 7, 2**15, 7
_FULL, _LAST = 1, 4


@dataclass
class OfflineRun:
    """One file: `history` has a dict a point, `config` and `summary` what they came to, names joined by slashes.

    `metrics` are (name, name of the x axis), `artifacts` (name, type, aliases).
    """

    run_id: str = ""
    project: str = ""
    name: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[tuple[str, str]] = field(default_factory=list)
    artifacts: list[tuple[str, str, list[str]]] = field(default_factory=list)
    exit_code: int | None = None


def read_offline_runs(folder: Path, timeout_seconds: float = 20.0) -> list[OfflineRun]:
    """The runs below `folder`, the oldest first, once all of them are whole.

    wandb's own process may still be writing when `wandb.finish()` has returned.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        runs = [_read(path) for path in sorted(folder.rglob("*.wandb"))]
        if all(run.exit_code is not None for run in runs) or time.monotonic() > deadline:
            return runs
        time.sleep(0.05)


def _read(path: Path) -> OfflineRun:
    from wandb.proto.wandb_internal_pb2 import Record

    run = OfflineRun()
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.project, run.name = record.run.run_id, record.run.project, record.run.display_name
            _update(run.config, record.run.config.update)
        elif kind == "config":
            _update(run.config, record.config.update)
        elif kind == "history":
            point: dict[str, Any] = {}
            _update(point, record.history.item)
            run.history.append({name: value for name, value in point.items() if not name.startswith("_")})
        elif kind == "summary":
            _update(run.summary, record.summary.update)
        elif kind == "metric":
            run.metrics.append((record.metric.name or record.metric.glob_name, record.metric.step_metric))
        elif kind == "artifact":
            run.artifacts.append((record.artifact.name, record.artifact.type, sorted(record.artifact.aliases)))
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _update(target: dict[str, Any], items: Any) -> None:
    for item in items:
        name = item.key or "/".join(item.nested_key)
        target[name] = json.loads(item.value_json)


def _records(data: bytes) -> Iterator[bytes]:
    position, whole = _FILE_HEADER, b""
    while position + _RECORD_HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _RECORD_HEADER:  # the rest of a block
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        start, position = position + _RECORD_HEADER, position + _RECORD_HEADER + length
        if position > len(data):  # it is being written
            return
        whole += data[start:position]
        if kind in (_FULL, _LAST):
            yield whole
            whole = b""
