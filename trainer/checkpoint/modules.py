"""`load_from_checkpoint` of modules, from any file that holds weights, and of data modules."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from ..hooks import overridden
from ..hparams import filter_init_arguments
from ..module import Module
from ..rank_zero import rank_zero_warn
from .convert import load_weights_of
from .load import load


def load_module(
    cls: type[Any],
    path: str | os.PathLike[str],
    map_location: Any,
    hparams_file: str | os.PathLike[str] | None,
    strict: bool | None,
    overrides: dict[str, Any],
) -> Any:
    """A `cls` made from the hyper-parameters at `path` and `overrides`, with the weights at `path`."""
    weights = load_weights_of(path)
    stored = dict(weights.hyper_parameters) | _from_file(hparams_file)
    if weights.left_out:
        rank_zero_warn(f"{path}: {', '.join(weights.left_out)} could not be read without executing code; left out.")
    module = cls(**filter_init_arguments(cls, stored, overrides, weights.hparams_name, weights.init_names))
    module.configure_model()
    checkpoint = {"state_dict": weights.state_dict, "hyper_parameters": weights.hyper_parameters}
    if overridden(module, "on_load_checkpoint", Module):  # which may have been written for any part of it
        checkpoint = {**weights.extra, **weights.read_state(), **checkpoint}
        module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading if strict is None else strict)
    return module.to(map_location) if isinstance(map_location, (str, int, torch.device)) else module


def load_datamodule(
    cls: type[Any],
    path: str | os.PathLike[str],
    hparams_file: str | os.PathLike[str] | None,
    overrides: dict[str, Any],
) -> Any:
    """A `cls` made from the data module's hyper-parameters at `path` and `overrides`."""
    loaded = load(path)
    stored = dict(loaded.state_item("datamodule_hyper_parameters") or {}) | _from_file(hparams_file)
    return cls(**filter_init_arguments(cls, stored, overrides, loaded.state_item("datamodule_hparams_name")))


def _from_file(path: str | os.PathLike[str] | None) -> dict[str, Any]:
    if path is None:
        return {}
    with open(path, encoding="utf-8") as file:
        if os.fspath(path).endswith(".json"):
            held: dict[str, Any] = json.load(file)
        else:
            import yaml

            held = yaml.safe_load(file)
    return held
