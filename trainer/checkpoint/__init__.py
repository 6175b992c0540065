"""Checkpoints: folders of safetensors and JSON that are whole or do not count, and that load without running anything.

    epoch=3-step=400.ckpt/
        index.json             which tensor lies in which file, as boxes (offset, shape) of its whole shape
        state.json             everything that is no tensor: the trees of `encode.py`
        model.safetensors      weights and buffers; opens with `safetensors.torch.load_file`
        optimizer.safetensors
        state.safetensors
        manifest.json          written last: step, versions, and each file's size and checksums

Read `save.py` first, then `load.py`; each is the story of one direction and says which file owns which step:
`encode.py` (Python values as JSON), `tensors.py` (the safetensors format), `blocks.py` (checksums), `index.py`
(boxes), `manifest.py`, `storage.py` (disks and object stores), `unfinished.py` (what a killed save leaves behind).
`find.py` finds the newest whole checkpoint, `optimizer.py` names optimizer state by parameter, and `convert.py` reads
weights that others wrote.
"""

from __future__ import annotations

from .convert import Weights, load_weights_of
from .encode import decode, encode
from .find import find_newest, is_checkpoint
from .load import Loaded, load, verify
from .manifest import Manifest, read_manifest
from .optimizer import load_optimizer_state_by_name, optimizer_state_by_name
from .pointer import resolve_pointer, write_pointer
from .save import remove, save

__all__ = [
    "Loaded",
    "Manifest",
    "Weights",
    "decode",
    "encode",
    "find_newest",
    "is_checkpoint",
    "load",
    "load_optimizer_state_by_name",
    "load_weights_of",
    "optimizer_state_by_name",
    "read_manifest",
    "remove",
    "resolve_pointer",
    "save",
    "verify",
    "write_pointer",
]
