"""What loading large weights costs each rank in host memory and time: `trainer.load_weights` into a model built late.

    python benchmarks/load_weights.py              2 GiB on four ranks, FSDP, from an index of files
    python benchmarks/load_weights.py --strategy ddp --source checkpoint --url s3://bucket/folder

A rank prints what it holds of the model and, for placing and loading it and then for loading it once more, the most
memory it took beyond what it had, and seconds. Under FSDP the model is built on the meta device. Linux only: the peaks
come from /proc. Sources: a "file", an "index" of several (Hugging Face's form), a "checkpoint" of ours.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import paceline as pl
from paceline.trainer.checkpoint.save import save

MIB = 2**20
WIDTH = 4096  # 64 MiB a matrix
PLACE = "BENCHMARK_WEIGHTS"


class Usage:
    """The memory that this process takes from now on."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._before, self._started = memory("VmRSS"), time.perf_counter()

    def __str__(self) -> str:
        peak, seconds = memory("VmHWM") - self._before, time.perf_counter() - self._started
        return f"+{peak / MIB:.0f} MiB, {seconds:.1f} s"


def memory(name: str) -> int:
    """Bytes that this process holds ("VmRSS"), or held at most ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Large(pl.Module):
    """Equal matrices; the i-th is full of i in the files."""

    def __init__(self, path: str, layers: int) -> None:
        super().__init__()
        self.path, self.layers = path, layers

    def configure_model(self) -> None:
        """When this has returned, the model is placed and loaded."""
        self.usage = Usage()
        self.stack = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(self.layers)))
        self.trainer.load_weights(self.path)

    def on_validation_start(self) -> None:
        """Print what it took; and again."""
        told = [f"place and load {self.usage}"]
        usage = Usage()
        self.trainer.load_weights(self.path)
        told.append(f"load {usage}")
        held = [p.to_local() if hasattr(p, "to_local") else p for p in self.parameters()]
        assert all(bool((tensor == i).all()) for i, tensor in enumerate(held)), "not the values of the files"
        size = sum(tensor.nbytes for tensor in held)
        print(f"rank {self.global_rank} holds {size / MIB:.0f} MiB; {'; '.join(told)}", flush=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: no layer is gathered."""


def write(source: str, folder: Path, layers: int) -> str:
    """The weights in `folder`; returns what to load."""
    weights: dict[str, Tensor] = {f"stack.{i}.weight": torch.full((WIDTH, WIDTH), float(i)) for i in range(layers)}
    if source == "checkpoint":
        return os.path.basename(save(folder / "large.ckpt", model=weights, meta={"global_step": 0, "epoch": 0}))
    if source == "file":
        save_file(weights, folder / "large.safetensors")
        return "large.safetensors"
    places = {name: f"part-{i // 4}.safetensors" for i, name in enumerate(weights)}
    for file in set(places.values()):
        save_file({name: tensor for name, tensor in weights.items() if places[name] == file}, folder / file)
    (folder / "large.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return "large.safetensors.index.json"


def main() -> None:
    """Write the weights, then start the ranks, which are this program again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--strategy", default="fsdp")
    parser.add_argument("--source", default="index", choices=["file", "index", "checkpoint"])
    parser.add_argument("--url", help="where to put the files first, as s3://bucket/folder")
    arguments = parser.parse_args()
    layers = round(arguments.gib * 2**30 / (4 * WIDTH * WIDTH))
    with tempfile.TemporaryDirectory() as folder:
        if PLACE not in os.environ:
            name = write(arguments.source, Path(folder), layers)
            if arguments.url:
                fsspec.core.url_to_fs(arguments.url)[0].put(f"{folder}/", f"{arguments.url}/", recursive=True)
            os.environ[PLACE] = f"{arguments.url or folder}/{name}"
        trainer = pl.Trainer(
            accelerator="cpu", devices=arguments.ranks, strategy=arguments.strategy, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.validate(Large(os.environ[PLACE], layers), [torch.zeros(1)] * arguments.ranks, verbose=False)


if __name__ == "__main__":
    main()
