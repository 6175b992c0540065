"""`load_module`: `Module.load_from_checkpoint`, from any file that holds weights."""

from __future__ import annotations

import json
import os
from typing import Any

from ..hparams import filter_init_arguments
from ..rank_zero import rank_zero_warn
from .convert import load_weights_of


def load_module(
    cls: type[Any],
    path: str | os.PathLike[str],
    map_location: Any,
    hparams_file: str | os.PathLike[str] | None,
    strict: bool | None,
    overrides: dict[str, Any],
) -> Any:
    """A `cls` made from the hyper-parameters at `path` and `overrides`, with the weights at `path`."""
    weights = load_weights_of(path, map_location if isinstance(map_location, str) else "cpu")
    stored = dict(weights.hyper_parameters)
    if hparams_file is not None:
        with open(hparams_file, encoding="utf-8") as file:
            stored.update(json.load(file))
    if weights.left_out:
        rank_zero_warn(f"{path}: {', '.join(weights.left_out)} could not be read without executing code; left out.")
    module = cls(**filter_init_arguments(cls, stored, overrides, weights.hparams_name, weights.init_names))
    checkpoint = {"state_dict": weights.state_dict, "hyper_parameters": weights.hyper_parameters}
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading if strict is None else strict)
    return module
