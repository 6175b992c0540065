"""How much a step of training costs over a hand-written loop: `python benchmarks/overhead.py`, or `make bench`.

One tiny model is trained by a hand-written loop and by Paceline, each in a fresh process with one thread and a
terminal to draw on. The processes take turns, one block of 500 steps each (A B A B ...), so that a machine whose speed
drifts is as slow for one as for the other; a round's figure is the median over its blocks, the table's that over the
rounds. On a busy machine trust the CPU time. `--rivals lightning accelerate` adds others, run by `--python` where they
are installed elsewhere; each is compared with the hand-written loop in the same interpreter.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import pty
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

BATCH_SIZE = 32
BLOCK = 500
WARM_UP = 1000
COUNTED = range(8, 16)  # after the timed steps: those whose Python calls are counted
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
    """Ticks at the start of each step: times blocks of steps when it is their turn, then counts a few steps' calls."""

    def __init__(self, blocks: int, turns: int, reports: int) -> None:
        self.stop = WARM_UP + blocks * BLOCK
        self._step = self._calls = 0
        self._began = (0.0, 0.0)
        self._turns, self._reports = turns, reports  # pipes

    def tick(self) -> None:
        step = self._step
        self._step += 1
        if step % BLOCK == 0 and WARM_UP <= step <= self.stop:
            self._end_block(step)
        elif step == self.stop + COUNTED.start:
            sys.setprofile(self._count)
        elif step == self.stop + COUNTED.stop:
            sys.setprofile(None)
            self._report(self._calls / len(COUNTED))

    def _end_block(self, step: int) -> None:
        now = (time.perf_counter(), time.process_time())
        self._report(*((end - begin) / BLOCK * 1e6 for begin, end in zip(self._began, now, strict=True)))
        os.read(self._turns, 1)
        self._began = (time.perf_counter(), time.process_time())

    def _report(self, *figures: float) -> None:
        os.write(self._reports, (json.dumps(figures) + "\n").encode())

    def _count(self, frame: Any, event: str, argument: Any) -> None:
        self._calls += event == "call"


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def adam(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def batches(clock: Clock) -> DataLoader[Any]:
    samples = BATCH_SIZE * (clock.stop + 2 * COUNTED.stop)
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


def run_here(runner: str, case: str, blocks: int, turns: int, reports: int) -> None:
    """In the fresh process: train, and report a line for each block."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        RUNNERS[runner](CASES[case], Clock(blocks, turns, reports), folder)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if runner != BASELINE:
        versions[runner] = sys.modules[runner].__version__
    os.write(reports, (json.dumps(versions) + "\n").encode())


# --- in turn, in fresh processes ------------------------------------------------------------------------------------
class Fresh:
    """A fresh process that trains in blocks, one for each turn that it is given."""

    def __init__(self, python: str, runner: str, case: str, blocks: int) -> None:
        self.name = f"{runner} ({case})"
        terminal, its_terminal = pty.openpty()
        fcntl.ioctl(its_terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
        its_turns, self._turns = os.pipe()
        reports, its_reports = os.pipe()
        child = ["--child", runner, case, str(its_turns), str(its_reports)]
        self._process = subprocess.Popen(
            [python, __file__, "--blocks", str(blocks), *child],
            stdin=its_terminal,
            stdout=its_terminal,
            stderr=its_terminal,
            pass_fds=(its_turns, its_reports),
        )
        for its_end in (its_terminal, its_turns, its_reports):
            os.close(its_end)
        self._reports = os.fdopen(reports)
        self._output = b""
        self._reader = threading.Thread(target=self._read_terminal, args=(terminal,))
        self._reader.start()

    def report(self) -> Any:
        """The next line that it reports; the end of this program where it failed."""
        if line := self._reports.readline():
            return json.loads(line)
        self._reader.join()
        return sys.exit(f"{self.name} failed:\n{self._output.decode(errors='replace')}")

    def take_turn(self) -> Any:
        """Let it train until it reports."""
        os.write(self._turns, b".")
        return self.report()

    def end(self) -> dict[str, str]:
        """Wait for its end; the versions that it ran with."""
        versions: dict[str, str] = self.report()
        os.close(self._turns)
        self._reports.close()
        self._process.wait()
        self._reader.join()
        return versions

    def _read_terminal(self, terminal: int) -> None:
        try:
            while chunk := os.read(terminal, 65536):
                self._output = (self._output + chunk)[-4000:]
        except OSError:  # how Linux says that nobody writes any more
            pass
        os.close(terminal)


@dataclass
class Figures:
    """Medians of a round: µs a step, what it is over the hand-written loop (of CPU time too), their ratio; calls."""

    wall: float
    wall_more: float
    cpu_more: float
    ratio: float
    calls: float
    calls_more: float


def run_round(case: str, runners: list[tuple[str, str]], blocks: int) -> tuple[list[Figures], dict[str, str]]:
    """Train a case with each of `runners` (interpreter, name) block by block; their figures, and all versions."""
    processes = [Fresh(python, runner, case, blocks) for python, runner in runners]
    for process in processes:
        process.report()  # warm
    timed = [[process.take_turn() for process in processes] for _ in range(blocks)]
    calls = [process.take_turn()[0] for process in processes]
    versions = {name: number for process in processes for name, number in process.end().items()}
    figures = []
    for index, (python, _) in enumerate(runners):
        base = runners.index((python, BASELINE))
        pairs = [(block[index], block[base]) for block in timed]
        figures.append(
            Figures(
                wall=statistics.median(own[0] for own, _ in pairs),
                wall_more=statistics.median(own[0] - other[0] for own, other in pairs),
                cpu_more=statistics.median(own[1] - other[1] for own, other in pairs),
                ratio=statistics.median(own[1] / other[1] for own, other in pairs),
                calls=calls[index],
                calls_more=calls[index] - calls[base],
            )
        )
    return figures, versions


def table(found: dict[tuple[str, int, str], list[Figures]]) -> str:
    """A row for each case and runner, in Markdown."""
    lines = [
        "| case | loop | µs a step | over the hand-written loop | in CPU time | ratio | Python calls a step |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (case, _, runner), rounds in found.items():
        median = {name: statistics.median(vars(figures)[name] for figures in rounds) for name in vars(rounds[0])}
        row = [CASES[case].description, runner, f"{median['wall']:.0f}"]
        if runner == BASELINE:
            row += ["", "", "", f"{median['calls']:.0f}"]
        else:
            target = f" (target: {CASES[case].at_most})" if runner == "paceline" else ""
            row += [f"{median['wall_more']:+.1f} µs{target}", f"{median['cpu_more']:+.1f} µs"]
            row += [f"{median['ratio']:.3f}", f"{median['calls_more']:+.0f}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def machine() -> str:
    """The processor's name and how many of it there are."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} CPUs, {platform.system()}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of fresh processes")
    parser.add_argument("--blocks", type=int, default=20, help=f"timed blocks of {BLOCK} steps in each process")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=[])
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has the rivals")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.child:
        runner, case, turns, reports = args.child
        return run_here(runner, case, args.blocks, int(turns), int(reports))
    runners = [(sys.executable, BASELINE), (sys.executable, "paceline")]
    if args.rivals and args.python != sys.executable:
        runners.append((args.python, BASELINE))
    runners += [(args.python, rival) for rival in args.rivals]
    found: dict[tuple[str, int, str], list[Figures]] = {}
    versions: dict[str, str] = {}
    for number in range(args.rounds):
        for case in args.cases:
            print(f"round {number + 1} of {args.rounds}: {CASES[case].description}", file=sys.stderr, flush=True)
            figures, used = run_round(case, runners, args.blocks)
            versions |= used
            for place, (_, runner) in enumerate(runners):
                found.setdefault((case, place, runner), []).append(figures[place])
    print(table(dict(sorted(found.items(), key=lambda item: (args.cases.index(item[0][0]), item[0][1])))))
    print(f"\n{machine()}; {', '.join(f'{name} {number}' for name, number in versions.items())}.")
    print(f"Medians of {args.rounds} rounds of {args.blocks} blocks of {BLOCK} steps: `python {' '.join(sys.argv)}`.")
    return None


if __name__ == "__main__":
    main()
