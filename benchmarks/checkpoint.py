"""What a save costs: how long it blocks training, and how long until it is durable, beside other ways in one run.

    python benchmarks/checkpoint.py                    1.2 GB of state (a model and Adam's averages) on the CPU
    python benchmarks/checkpoint.py --gib 4.5 --device cuda

Rows: copying the bytes in memory (into memory that is in use already), a plain write with fsync, torch.save with
fsync, and our saves: the first (its memory was taken while training began), later ones, and `async_save=False`. Rounds
go through all rows in turn; the best of each is printed, with its ratio to the copy (blocked) or to the plain write
(durable).
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn

from paceline.strategies import SingleDevice
from paceline.trainer.checkpoint.optimizer import optimizer_state_by_name
from paceline.trainer.checkpoint.save import Prepared, prepare
from paceline.trainer.checkpoint.saver import FollowUp, Saver
from paceline.trainer.checkpoint.tensors import bytes_of


def make_state(gib: float, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an Adam that has stepped, of so many GiB together."""
    width, layers = 2048, max(1, round(gib * 2**30 / (3 * 4 * 2048 * 2048)))
    module = nn.Sequential(*(nn.Linear(width, width, device=device) for _ in range(layers)))
    optimizer = torch.optim.Adam(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return module, optimizer


def prepared(module: nn.Module, optimizer: torch.optim.Optimizer) -> Prepared:
    """What a save of a run prepares."""
    tree = optimizer_state_by_name(optimizer, dict(module.named_parameters()))
    return prepare(model=module.state_dict(), optimizer=[tree], meta={"global_step": 1, "epoch": 0})


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.2e9 / 2**30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", default=None, help="where to write (default: the folder of temporary files)")
    arguments = parser.parse_args()
    module, optimizer = make_state(arguments.gib, arguments.device)
    tensors = [piece.tensor for part in prepared(module, optimizer).parts.values() for piece in part]
    size = sum(tensor.nbytes for tensor in tensors)
    pinned = arguments.device == "cuda"
    host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned).zero_() for t in tensors]
    folder = tempfile.mkdtemp(prefix="paceline-bench-", dir=arguments.folder)
    saver = Saver(SingleDevice())

    def synchronize() -> None:
        if pinned:
            torch.cuda.synchronize()

    def copy() -> tuple[float, float]:
        started = time.perf_counter()
        for target, source in zip(host, tensors, strict=True):
            target.copy_(source, non_blocking=pinned)
        synchronize()
        return time.perf_counter() - started, 0.0

    def plain() -> tuple[float, float]:
        copy()
        started = time.perf_counter()
        with open(f"{folder}/plain", "wb", buffering=0) as file:
            for tensor in host:
                file.write(bytes_of(tensor))
            os.fsync(file.fileno())
        taken = time.perf_counter() - started
        return taken, taken

    def torch_save() -> tuple[float, float]:
        started = time.perf_counter()
        with open(f"{folder}/torch", "wb") as file:
            torch.save({"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}, file)
            file.flush()
            os.fsync(file.fileno())
        taken = time.perf_counter() - started
        return taken, taken

    def ours(wait: bool) -> tuple[float, float]:
        synchronize()
        started = time.perf_counter()
        saver.start(f"{folder}/ours.ckpt", prepared(module, optimizer), FollowUp(), wait)
        synchronize()  # the device, too, waits for the copy
        blocked = time.perf_counter() - started
        outcome = saver.settle()
        assert outcome is not None and outcome.error is None, outcome
        return blocked, time.perf_counter() - started

    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "copy in memory": copy,
        "plain write, fsync": plain,
        "torch.save, fsync": torch_save,
        "ours": lambda: ours(wait=False),
        "ours, async_save=False": lambda: ours(wait=True),
    }
    saver.reserve([(tensor.nbytes, tensor.is_cuda) for tensor in tensors])
    time.sleep(2 + size / 1e9)  # training's first steps
    found: dict[str, list[tuple[float, float]]] = {"ours, the first save": [ours(wait=False)]}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            for file in os.listdir(folder):
                place = os.path.join(folder, file)
                shutil.rmtree(place) if os.path.isdir(place) else os.unlink(place)
            os.sync()
            found.setdefault(name, []).append(way())
    shutil.rmtree(folder)
    best = {name: tuple(min(column) for column in zip(*times, strict=True)) for name, times in found.items()}
    print(f"{size / 1e9:.2f} GB in {len(tensors)} tensors on {arguments.device}, best of {arguments.rounds}\n")
    print("| way | training waits, s | ÷ copy | durable after, s | ÷ plain write |\n|---|---|---|---|---|")
    for name, (blocked, durable) in best.items():
        ratios = blocked / best["copy in memory"][0], durable / best["plain write, fsync"][1]
        after = f"{durable:.2f} | {ratios[1]:.2f}" if durable else " | "
        print(f"| {name} | {blocked:.3f} | {ratios[0]:.2f} | {after} |")


if __name__ == "__main__":
    main()
