"""`paceline checkpoint`: what is in a checkpoint, whether it is whole, what changed, and what others can read of it.

    paceline checkpoint ls runs                      every checkpoint below a folder
    paceline checkpoint show CHECKPOINT              its facts and its tensors
    paceline checkpoint verify CHECKPOINT            every byte against its checksum; exit code 1 where it is not whole
    paceline checkpoint diff ONE OTHER               tensors and values that differ; exit code 1 where any do
    paceline checkpoint consolidate FROM TO          shards as whole files
    paceline checkpoint export FROM FOLDER           model.safetensors (and config.json): what from_pretrained reads
    paceline checkpoint import FILE.ckpt TO          a Lightning checkpoint as one of ours

`--json` prints one JSON value in the place of a table.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-commands; each sets `action`."""
    actions = parser.add_subparsers(dest="action_name", metavar="ACTION", required=True)

    def action(name: str, told: str, run: Callable[[argparse.Namespace], int], *paths: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=told, description=told)
        for path in paths:
            sub.add_argument(path)
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(action=run)
        return sub

    action("ls", "list the checkpoints below a folder", _ls, "folder")
    action("show", "tell what is in a checkpoint", _show, "checkpoint")
    action("verify", "compare every byte with its checksum", _verify, "checkpoint")
    action("diff", "tell what differs between two checkpoints", _diff, "one", "other")
    action("consolidate", "write shards as whole files", _consolidate, "source", "target")
    export = action("export", "write what from_pretrained reads", _export, "source", "folder")
    export.add_argument("--config", help="a config.json to put beside the weights")
    export.add_argument("--prefix", default="", help="a prefix to cut off the names of weights, such as 'model.'")
    action("import", "read a Lightning checkpoint", _import, "source", "target")


def run(arguments: argparse.Namespace) -> int:
    """Run the sub-command; the exit code."""
    code: int = arguments.action(arguments)
    return code


def _ls(arguments: argparse.Namespace) -> int:
    from .checkpoint.inspect import list_below

    found = list_below(arguments.folder)
    rows = []
    for f in found:
        problem = f.problem.replace(f"{f.path}/", "").replace(f.path, "it")
        rows.append((_short(f.path), f.step, f.epoch, f.time, _size(f.bytes), problem or "whole"))
    head = ("checkpoint", "step", "epoch", "saved", "size", "state")
    _print(arguments.json, found, head, rows, f"No checkpoint in {arguments.folder} or below.")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from .checkpoint.inspect import facts, tensors_in

    told, tensors = facts(arguments.checkpoint), tensors_in(arguments.checkpoint)
    if arguments.json:
        _print_json({**told, "tensors": tensors})
        return 0
    _table(("", ""), [(name, value) for name, value in told.items()])
    rows = [(t.part, t.name, t.dtype, "x".join(map(str, t.shape)) or "-", _size(t.bytes), t.boxes) for t in tensors]
    _table(("part", "tensor", "dtype", "shape", "size", "boxes"), rows)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from .checkpoint.load import verify

    problems = verify(arguments.checkpoint)
    if arguments.json:
        _print_json({"whole": not problems, "problems": problems})
    else:
        print("\n".join(problems) if problems else f"{arguments.checkpoint} is whole: every byte has its checksum.")
    return 1 if problems else 0


def _diff(arguments: argparse.Namespace) -> int:
    from .checkpoint.inspect import differences

    found = differences(arguments.one, arguments.other)
    rows = [(d.part, d.name, d.how, None if d.largest is None else f"{d.largest:.3g}") for d in found]
    head = ("part", "name", "how", "largest difference")
    _print(arguments.json, found, head, rows, "No tensor and no value differs.")
    return 1 if found else 0


def _consolidate(arguments: argparse.Namespace) -> int:
    from .checkpoint.exchange import consolidate

    return _told(arguments, consolidate(arguments.source, arguments.target))


def _export(arguments: argparse.Namespace) -> int:
    from .checkpoint.exchange import export

    return _told(arguments, export(arguments.source, arguments.folder, arguments.config, arguments.prefix))


def _import(arguments: argparse.Namespace) -> int:
    from .checkpoint.exchange import import_lightning

    path, left_out = import_lightning(arguments.source, arguments.target)
    if left_out and not arguments.json:
        print(f"Left out, since it names no weights, or reading it would execute code: {', '.join(left_out)}")
    return _told(arguments, path, left_out=left_out)


def _told(arguments: argparse.Namespace, path: str, **more: Any) -> int:
    if arguments.json:
        _print_json({"path": path, **more})
    else:
        print(f"Wrote {path}")
    return 0


def _print(as_json: bool, items: Sequence[Any], head: Sequence[str], rows: Sequence[Any], none: str) -> None:
    if as_json:
        _print_json(items)
    elif items:
        _table(head, rows)
    else:
        print(none)


def _short(path: str) -> str:
    """A path as seen from here, where that is shorter: it leaves the table its width."""
    return path if "://" in path else min(path, os.path.relpath(path), key=len)


def _print_json(value: Any) -> None:
    print(json.dumps(value, default=lambda item: str(item) if not hasattr(item, "__dict__") else vars(item), indent=2))


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=box.SIMPLE, show_header=any(head))
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))  # a str's [brackets] are markup
    Console(soft_wrap=False).print(table)


def _size(count: float | None) -> str | None:
    if count is None:
        return None
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
