"""Checkpoints in other forms: whole files out of shards, weights for `from_pretrained`, and Lightning's files.

`export` writes what transformers' `from_pretrained` reads: a folder with `model.safetensors` and, if given,
`config.json`. `import_lightning` makes a checkpoint of the weights, hyper-parameters, step and, where every parameter
of an optimizer can be told by its place, the optimizer state of a Lightning `.ckpt`; nothing in it is executed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from .convert import load_weights_of
from .find import is_checkpoint
from .index import Piece, without_aliases
from .load import load
from .pointer import resolve_pointer
from .save import file_buffers, save
from .storage import reading, storage_of, writing
from .strict_json import take_count


def consolidate(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> str:
    """Write the checkpoint `source` with every tensor whole; the run's other facts stay. Returns the path it got."""
    loaded = load(source)
    meta = {**loaded.meta, "world_size": loaded.manifest.world_size}
    return save(target, model=loaded.model, optimizer=loaded.optimizer, state=loaded.state, meta=meta)


def export(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    config: str | os.PathLike[str] | None = None,
    prefix: str = "",
) -> str:
    """Write `model.safetensors`, and `config` as `config.json`, into `folder`; returns the weights' path.

    `prefix` is cut off the names of weights; those without it are left out. Tied weights are written once, under the
    first of their names, as `save_pretrained` does. Raises CheckpointError where a file of that name exists.
    """
    weights = load_weights_of(source).state_dict
    named = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix) and isinstance(t, Tensor)}
    if not named:
        first = ", ".join(list(weights)[:5])
        raise CheckpointError(
            f"{os.fspath(source)} has no weight whose name begins with {prefix!r}; they are {first} ..."
        )
    storage, place = storage_of(folder)
    target, settings = storage.join(place, "model.safetensors"), storage.join(place, "config.json")
    with reading(os.fspath(config or "")):
        config_bytes = Path(config).read_bytes() if config is not None else b""
    with writing(target, "written"):
        for path in (target, settings) if config_bytes else (target,):
            if storage.exists(path):
                raise CheckpointError(f"{path} exists already. Move it away, or export to another folder.")
        kept, _ = without_aliases(named)
        storage.make_folder(place)
        storage.write(target, file_buffers([Piece.whole(name, tensor) for name, tensor in kept.items()]))
        if config_bytes:
            storage.create(settings, config_bytes)
    return target


def import_lightning(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> tuple[str, list[str]]:
    """Write a checkpoint from a Lightning `.ckpt`; its path, and what of it could not be read."""
    if is_checkpoint(resolve_pointer(source)):
        raise CheckpointError(f"{os.fspath(source)} is a checkpoint of ours already; `consolidate` copies one.")
    weights = load_weights_of(source)
    content = weights.extra
    names = [name for name, value in weights.state_dict.items() if isinstance(value, Tensor)]
    held = content.get("optimizer_states")
    optimizers = [_by_name(state, names, weights.state_dict) for state in (held if isinstance(held, list) else [])]
    where = os.fspath(source)
    meta = {key: take_count({key: 0, **content}, key, where) for key in ("global_step", "epoch")}
    state = {
        **meta,
        "hyper_parameters": weights.hyper_parameters,
        "hparams_name": weights.hparams_name,
        "imported_from": os.path.basename(where),
    }
    known = optimizers and all(optimizers)
    saved = save(target, model=weights.state_dict, optimizer=optimizers if known else None, state=state, meta=meta)
    return saved, weights.left_out + (["optimizer_states"] if held and not known else [])


def _by_name(state: Any, names: list[str], weights: Mapping[str, Any]) -> dict[str, Any] | None:
    """An optimizer's state by parameter name, where numbers can only mean one thing; else None.

    Lightning numbers the parameters of an optimizer; they are the model's in order if there are as many as weights
    with a state of the same shape.
    """
    try:
        groups = [(list(group["params"]), group) for group in state["param_groups"]]
        held = {int(number): dict(values) for number, values in state["state"].items()}
        if sorted(number for numbers, _ in groups for number in numbers) != list(range(len(names))):
            return None
        for number, values in held.items():
            shapes = [v.shape for v in values.values() if isinstance(v, Tensor) and v.dim()]
            if any(shape != weights[names[number]].shape for shape in shapes):
                return None
        return {
            "optimizer": "",
            "groups": [
                {
                    "params": [names[number] for number in numbers],
                    "options": {k: v for k, v in group.items() if k not in ("params", "param_names")},
                }
                for numbers, group in groups
            ],
            "state": {names[number]: values for number, values in held.items()},
            "other": {},
        }
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # no state that torch's optimizers write
        return None
