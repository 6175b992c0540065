"""Time a step over a hand-written loop, on one GPU or with DDP.

    python benchmarks/step_time.py
    torchrun --nproc-per-node 2 benchmarks/step_time.py             # DDP, a GPU a rank
    torchrun --nproc-per-node 2 benchmarks/step_time.py --cpu       # DDP on gloo, the tiny model alone

Two models: a tiny one whose steps are nothing but kernel launches, so that every microsecond of the host shows, and a
GPT of 124 million parameters, compiled, in bfloat16. The loops take turns in one process; the figure is the median over
the rounds. `--rivals lightning accelerate` adds others that are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DEVICE = torch.device("cpu") if "--cpu" in sys.argv else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
WARM_UP = 20


@dataclass(frozen=True)
class Case:
    """A model, its data, and how it is trained. `target`: a step's time over the hand-written one's, at most."""

    name: str
    target: float
    steps: int
    batch_size: int
    network: Callable[[], nn.Module]
    sample: Callable[[int], tuple[Tensor, Tensor]]
    bf16: bool = False
    compiled: bool = False


def tiny_samples(count: int) -> tuple[Tensor, Tensor]:
    """32 numbers and one of 10 classes."""
    return torch.randn(count, 32), torch.randint(0, 10, (count,))


def tokens(count: int) -> tuple[Tensor, Tensor]:
    """1,024 tokens and those that follow."""
    text = torch.randint(0, 256, (count, 1025))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def tiny_network() -> nn.Module:
    """Four linear layers."""
    layers = [part for _ in range(3) for part in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(32, 10))


def gpt() -> nn.Module:
    """GPT-2's size: 12 layers of width 768 and an embedding of 50,304, which the data uses 256 of."""
    from gpt import Block

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(50304, 768), nn.Embedding(1024, 768)
            self.blocks = nn.ModuleList(Block(768, 12, 0.0) for _ in range(12))
            self.norm, self.head = nn.LayerNorm(768), nn.Linear(768, 50304, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    return Network()


CASES = {
    "tiny": Case("tiny, bound by the host", 1.02, 1000, 32, tiny_network, tiny_samples),
    "gpt": Case("GPT-124M, compiled, bf16", 1.00, 40, 16, gpt, tokens, bf16=True, compiled=True),
}


def loss_of(network: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of the last dimension."""
    x, y = batch
    return F.cross_entropy(network(x).flatten(0, -2), y.flatten())


def loader(case: Case, share: bool = False) -> DataLoader[Any]:
    """Batches from pinned memory, enough for all steps; `share`: those of this rank alone."""
    data = TensorDataset(*case.sample((WARM_UP + case.steps) * case.batch_size * RANKS))
    sampler = DistributedSampler(data) if share and RANKS > 1 else None
    return DataLoader(data, case.batch_size, shuffle=sampler is None, sampler=sampler, pin_memory=DEVICE.type == "cuda")


def adam(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """Fused, as whoever counts microseconds would have it."""
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def wait() -> None:
    """Until the GPU is idle."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Ticks at the start of each step; the time between the warm-up and the end, each with the GPU idle."""

    def __init__(self) -> None:
        self.step = 0
        self.began = 0.0

    def tick(self) -> None:
        if self.step == WARM_UP:
            wait()
            self.began = time.perf_counter()
        self.step += 1

    def milliseconds(self) -> float:
        wait()
        return (time.perf_counter() - self.began) / (self.step - WARM_UP) * 1e3


# --- who trains -----------------------------------------------------------------------------------------------------
def hand_written(case: Case) -> float:
    network, clock = case.network().to(DEVICE), Clock()
    optimizer = adam(network.parameters())
    if case.compiled:
        network.compile()
    model = network
    if RANKS > 1:
        model = DistributedDataParallel(network, gradient_as_bucket_view=True)
    for x, y in loader(case, share=True):
        clock.tick()
        batch = x.to(DEVICE, non_blocking=True), y.to(DEVICE, non_blocking=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=case.bf16):
            loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return clock.milliseconds()


def _with_trainer(pl: Any, case: Case, compiled: Callable[[nn.Module], Any], **arguments: Any) -> float:
    clock = Clock()

    class Task(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = case.network()
            if case.compiled:
                compiled(self.network)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            clock.tick()
            return loss_of(self.network, batch)

        def on_train_end(self) -> None:
            self.time = clock.milliseconds()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adam(self.parameters())

    task = Task()
    extras = ("enable_progress_bar", "logger", "enable_checkpointing", "enable_model_summary")
    precision = "bf16-mixed" if case.bf16 else "32-true"
    off = dict.fromkeys(extras, False)
    devices = {"accelerator": "gpu" if DEVICE.type == "cuda" else "cpu", "devices": RANKS}
    if RANKS > 1:
        devices["strategy"] = "ddp"
    trainer = pl.Trainer(max_epochs=1, precision=precision, **devices, **off, **arguments)
    trainer.fit(task, loader(case))
    return float(task.time)


def paceline(case: Case) -> float:
    import paceline

    return _with_trainer(paceline, case, lambda network: None, compile=case.compiled)


def lightning(case: Case) -> float:
    import lightning

    return _with_trainer(lightning, case, lambda network: network.compile())


def accelerate(case: Case) -> float:
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16" if case.bf16 else "no", cpu=DEVICE.type == "cpu")
    network, clock = case.network(), Clock()
    if case.compiled:
        network.compile()
    model, optimizer, batches = accelerator.prepare(network, adam(network.parameters()), loader(case))
    for batch in batches:
        clock.tick()
        with accelerator.accumulate(model):
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    return clock.milliseconds()


RUNNERS = {"hand-written": hand_written, "paceline": paceline, "lightning": lightning, "accelerate": accelerate}


def tell(line: str) -> None:
    """Print it, on one rank."""
    if RANK == 0:
        print(line, flush=True)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rivals", nargs="+", choices=list(RUNNERS)[2:], default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="the tiny model on the CPU")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    on_gpu = DEVICE.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(DEVICE)
    if RANKS > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    versions = [f"{name} {version(name)}" for name in ("torch", *arguments.rivals)]
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    tell(f"{RANKS} x {where}, python {sys.version.split()[0]}, {', '.join(versions)}\n")
    tell("| case | loop | ms a step | over hand-written | peak GiB |\n|---|---|---:|---:|---:|")
    for case in (CASES[name] for name in arguments.cases if on_gpu or name == "tiny"):
        target = case.target if RANKS == 1 else 1.0
        names = ["hand-written", "paceline", *arguments.rivals]
        times: dict[str, list[float]] = {name: [] for name in names}
        peaks = dict.fromkeys(names, 0.0)
        for _ in range(arguments.rounds):
            for name in names:
                gc.collect()
                if on_gpu:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                torch.manual_seed(0)
                with contextlib.redirect_stdout(sys.stderr):  # what a trainer prints is none of the table
                    times[name].append(RUNNERS[name](case))
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        ratios = {
            name: statistics.median(t / h for t, h in zip(times[name], times[names[0]], strict=True)) for name in names
        }
        for name in names:
            over = "" if name == names[0] else f"{ratios[name]:.3f}" + f" (target: {target:.2f})" * (name == "paceline")
            tell(f"| {case.name} | {name} | {statistics.median(times[name]):.3f} | {over} | {peaks[name]:.2f} |")


if __name__ == "__main__":
    main()
