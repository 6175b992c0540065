"""How much a step of training costs over a hand-written loop: `python benchmarks/overhead.py`, or `make bench`.

One tiny model is trained by a hand-written loop and by Paceline, in turn, each time in a fresh process (A B A B ...),
on one thread and with a terminal to draw on. A process gives the median over blocks of 500 steps, a row of the table
the median over the rounds; differences are taken round by round, so that they hold while the machine's speed drifts.
On a busy machine trust the CPU time. `--rivals lightning accelerate` adds others, run by `--python` where they are
installed elsewhere; each is compared with the hand-written loop in the same interpreter.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import pty
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

BATCH_SIZE = 32
BLOCK = 500
WARM_UP = 1000
COUNTED = 4  # steps whose Python calls are counted, after the timed ones
NO_EXTRAS = {
    "enable_progress_bar": False,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Case:
    """What is compared; `at_most` is our target in µs a step, or a micro-batch."""

    description: str
    at_most: int
    accumulate: int = 1
    extras: bool = False


CASES = {
    "off": Case("extras off", 15),
    "defaults": Case("bar, loss logged each step, file logger", 40, extras=True),
    "accumulate": Case("accumulation 4, a micro-batch", 15, accumulate=4),
}


# --- what is trained ------------------------------------------------------------------------------------------------
class Clock:
    """Ticks at the start of each step: times whole blocks of steps, then counts the Python calls of a few."""

    def __init__(self, steps: int) -> None:
        self.stop = WARM_UP + steps
        self.step = 0
        self.calls = 0
        self.marks: list[tuple[float, float]] = []

    def tick(self) -> None:
        step = self.step
        self.step += 1
        if step % BLOCK == 0 and WARM_UP <= step <= self.stop:
            self.marks.append((time.perf_counter(), time.process_time()))
        if step == self.stop:
            sys.setprofile(self._count)
        elif step == self.stop + COUNTED:
            sys.setprofile(None)

    def _count(self, frame: Any, event: str, argument: Any) -> None:
        self.calls += event == "call"

    def figures(self) -> dict[str, float]:
        """µs of wall and CPU time a step, and Python calls."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        wall, cpu = (statistics.median((b[i] - a[i]) / BLOCK * 1e6 for a, b in pairs) for i in (0, 1))
        return {"wall": wall, "cpu": cpu, "calls": self.calls / COUNTED}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def adam(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def batches(clock: Clock) -> DataLoader[Any]:
    samples = BATCH_SIZE * (clock.stop + 2 * COUNTED)
    data = TensorDataset(torch.randn(samples, 32), torch.randint(0, 10, (samples,)))
    return DataLoader(data, BATCH_SIZE, shuffle=True)


# --- who trains it --------------------------------------------------------------------------------------------------
def hand_written(case: Case, clock: Clock, folder: str) -> None:
    model = network()
    optimizer = adam(model.parameters())
    for index, (x, y) in enumerate(batches(clock)):
        clock.tick()
        loss = F.cross_entropy(model(x), y)
        if index % case.accumulate == 0:
            optimizer.zero_grad()
        (loss if case.accumulate == 1 else loss / case.accumulate).backward()
        if (index + 1) % case.accumulate == 0:
            optimizer.step()


def paceline(case: Case, clock: Clock, folder: str) -> None:
    import paceline

    _with_trainer(paceline, case, clock, folder)


def lightning(case: Case, clock: Clock, folder: str) -> None:
    import lightning

    _with_trainer(lightning, case, clock, folder)


def _with_trainer(pl: Any, case: Case, clock: Clock, folder: str) -> None:
    class Task(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            clock.tick()
            x, y = batch
            loss = F.cross_entropy(self.model(x), y)
            if case.extras:
                self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adam(self.parameters())

    extras = {} if case.extras else NO_EXTRAS
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=case.accumulate,
        default_root_dir=folder,
        **extras,
    )
    trainer.fit(Task(), batches(clock))


def accelerate(case: Case, clock: Clock, folder: str) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=case.accumulate)
    module = network()
    model, optimizer, loader = accelerator.prepare(module, adam(module.parameters()), batches(clock))
    for x, y in loader:
        clock.tick()
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()


BASELINE = "hand-written"
RIVALS = ("lightning", "accelerate")
RUNNERS: dict[str, Callable[[Case, Clock, str], None]] = {
    BASELINE: hand_written,
    "paceline": paceline,
    "lightning": lightning,
    "accelerate": accelerate,
}


def run_here(runner: str, case: str, steps: int, folder: str) -> None:
    """In the fresh process: train, and leave the figures in `folder`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clock = Clock(steps)
    RUNNERS[runner](CASES[case], clock, folder)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if runner != BASELINE:
        versions[runner] = _version(runner)
    Path(folder, "figures.json").write_text(json.dumps({**clock.figures(), "versions": versions}))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "not installed"


# --- in turn, in fresh processes ------------------------------------------------------------------------------------
def run_afresh(python: str, runner: str, case: str, steps: int) -> dict[str, Any]:
    """The figures of one process, which has a terminal of its own to draw on."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
        command = [python, __file__, "--child", runner, case, folder, "--steps", str(steps)]
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder)
        os.close(theirs)
        output = _drain(ours)
        if process.wait() != 0:
            sys.exit(f"{runner} ({case}) failed:\n{output[-4000:]}")
        figures: dict[str, Any] = json.loads(Path(folder, "figures.json").read_text())
        return figures


def _drain(terminal: int) -> str:
    """All that is written to a terminal until its last writer ends."""
    written = b""
    try:
        while chunk := os.read(terminal, 65536):
            written += chunk
    except OSError:  # how Linux says that nobody writes any more
        pass
    os.close(terminal)
    return written.decode(errors="replace")


def measure(cases: list[str], runners: list[tuple[str, str]], rounds: int, steps: int) -> dict[Any, list[dict[str, Any]]]:
    """(case, interpreter, runner) → the figures of each round."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for number in range(rounds):
        for case in cases:
            for python, runner in runners:
                print(f"round {number + 1} of {rounds}: {case}, {runner}   ", end="\r", file=sys.stderr, flush=True)
                found.setdefault((case, python, runner), []).append(run_afresh(python, runner, case, steps))
    print(" " * 60, end="\r", file=sys.stderr)
    return found


def table(found: dict[Any, list[dict[str, Any]]]) -> str:
    """A row for each runner and case, in Markdown."""
    lines = [
        "| case | loop | µs a step | over the hand-written loop | of CPU time | Python calls a step |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (case, python, runner), rounds in found.items():
        own = {name: statistics.median(figures[name] for figures in rounds) for name in ("wall", "cpu", "calls")}
        row = [CASES[case].description, runner, f"{own['wall']:.0f}"]
        if runner == BASELINE:
            row += ["", "", f"{own['calls']:.0f}"]
        else:
            base = found[case, python, BASELINE]
            wall, cpu, calls = (_more(rounds, base, name) for name in ("wall", "cpu", "calls"))
            target = f" (target {CASES[case].at_most})" if runner == "paceline" else ""
            row += [f"{wall:+.0f} µs{target}", f"{cpu:+.0f} µs", f"{calls:+.0f}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _more(rounds: list[dict[str, Any]], base: list[dict[str, Any]], name: str) -> float:
    """The median over the rounds of the difference to the hand-written loop of the same round."""
    return statistics.median(figures[name] - other[name] for figures, other in zip(rounds, base, strict=True))


def machine() -> str:
    """The processor's name and how many of it there are."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5000, help=f"timed steps of each process, in blocks of {BLOCK}")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=[])
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has the rivals")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.child:
        runner, case, folder = args.child
        return run_here(runner, case, args.steps, folder)
    here = [(sys.executable, BASELINE), (sys.executable, "paceline")]
    elsewhere = [] if args.python == sys.executable else [(args.python, BASELINE)]
    rivals = [*elsewhere, *((args.python, rival) for rival in args.rivals)] if args.rivals else []
    found = measure(args.cases, [*here, *rivals], args.rounds, args.steps)
    versions = {name: number for rounds in found.values() for name, number in rounds[0]["versions"].items()}
    print(table(found))
    print(f"\n{machine()}; {', '.join(f'{name} {number}' for name, number in versions.items())}")
    print(f"{args.rounds} rounds of {args.steps} steps, medians: python {' '.join(sys.argv)}")
    return None


if __name__ == "__main__":
    main()
