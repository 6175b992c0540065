"""What a step costs, in counts that are the same on every machine; `benchmarks/overhead.py` has the times."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import paceline as pl

OURS = [Path(pl.__file__).parent / folder for folder in ("trainer", "callbacks", "strategies")]
COUNTED = range(16, 32)  # steps in which nothing is done for the first time and no epoch ends
NO_EXTRAS = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False}


# --- who counts -----------------------------------------------------------------------------------------------------
class PerStep:
    """A counter for each of the steps `COUNTED`. Training calls `tick` at the start of every step."""

    def __init__(self) -> None:
        self.step = -1
        self.steps: list[Counter[str]] = [Counter() for _ in COUNTED]

    def tick(self) -> None:
        self.step += 1
        if self.step == COUNTED.start:
            self.begin()
        if self.step == COUNTED.stop:
            self.end()

    def count(self, what: str) -> None:
        if self.step in COUNTED:
            self.steps[self.step - COUNTED.start][what] += 1

    def usual(self, accumulate: int = 1) -> Counter[str]:
        """What most windows count; the garbage collector's callbacks, or a chunk of indices, come now and then."""
        starts = range(0, len(self.steps), accumulate)
        windows = [sum(self.steps[start : start + accumulate], Counter()) for start in starts]
        return max(windows, key=windows.count)

    def begin(self) -> None:
        """The first counted step begins."""

    def end(self) -> None:
        """The last counted step is over."""


class PythonCalls(PerStep):
    """Counts calls of Python functions, ours by file."""

    def begin(self) -> None:
        sys.setprofile(self._on_event)

    def end(self) -> None:
        sys.setprofile(None)

    def _on_event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code is not PerStep.tick.__code__:
            path = Path(frame.f_code.co_filename)
            self.count("/".join(path.parts[-2:]) if path.parent in OURS else "elsewhere")


class Operations(PerStep):
    """Counts torch's operations by name: each makes a tensor, changes one, or reads one."""

    def __init__(self) -> None:
        super().__init__()
        self._mode = _Dispatched(self)

    def begin(self) -> None:
        self._mode.__enter__()

    def end(self) -> None:
        self._mode.__exit__(None, None, None)


class _Dispatched(TorchDispatchMode):
    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self._operations = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "profiler":  # a range with a name, which is no work
            self._operations.count(str(func))
        return func(*args, **(kwargs or {}))


class HostSyncs(PerStep):
    """Counts nothing: whatever waits for the GPU in the counted steps raises."""

    def begin(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def end(self) -> None:
        torch.cuda.set_sync_debug_mode("default")


# --- who trains -----------------------------------------------------------------------------------------------------
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=1e-3)


def batches() -> DataLoader[Any]:
    samples = 4 * (COUNTED.stop + 16)
    return DataLoader(TensorDataset(torch.randn(samples, 8), torch.randint(0, 4, (samples,))), 4, shuffle=True)


def train_by_hand(counts: PerStep, accumulate: int = 1) -> None:
    module = network()
    optimizer = adam(module)
    for index, (x, y) in enumerate(batches()):
        counts.tick()
        loss = F.cross_entropy(module(x), y)
        if index % accumulate == 0:
            optimizer.zero_grad()
        (loss * (1 / accumulate) if accumulate > 1 else loss).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()


class Classifier(pl.Module):
    def __init__(self, counts: PerStep, logs: bool = False) -> None:
        super().__init__()
        self.network = network()
        self.counts = counts
        self.logs = logs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.counts.tick()
        x, y = batch
        loss = F.cross_entropy(self.network(x), y)
        if self.logs:
            self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adam(self)


def train_with_paceline(counts: PerStep, logs: bool = False, **arguments: Any) -> None:
    trainer = pl.Trainer(max_epochs=1, **{"accelerator": "cpu", "devices": 1, **arguments})
    trainer.fit(Classifier(counts, logs), batches())


# --- what they find -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_makes_at_most_60_python_calls_more_than_that_of_a_hand_written_loop(accumulate: int) -> None:
    ours, by_hand = PythonCalls(), PythonCalls()
    train_with_paceline(ours, accumulate_grad_batches=accumulate, **NO_EXTRAS)
    train_by_hand(by_hand, accumulate)
    more = ours.usual(accumulate).total() - by_hand.usual(accumulate).total()
    assert more <= 60 * accumulate, ours.usual(accumulate)


def test_the_bar_the_logger_and_checkpoints_cost_at_most_40_python_calls_in_a_step_between_their_moments() -> None:
    extras, none = PythonCalls(), PythonCalls()
    train_with_paceline(extras, logs=True)
    train_with_paceline(none, **NO_EXTRAS)
    assert extras.usual().total() - none.usual().total() <= 40, extras.usual()


def test_a_step_without_callbacks_dispatches_no_hook() -> None:
    calls = PythonCalls()
    train_with_paceline(calls, **NO_EXTRAS)
    files = calls.usual()
    assert files["trainer/loop.py"] > 0
    assert files["trainer/hooks.py"] == 0
    assert not [name for name in files if name.startswith("callbacks")]


def test_a_step_dispatches_the_one_hook_that_is_overridden_and_no_other() -> None:
    class Watching(pl.Callback):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.Module) -> None: ...

    calls = PythonCalls()
    train_with_paceline(calls, callbacks=[Watching()], **NO_EXTRAS)
    assert calls.usual()["trainer/hooks.py"] == 1


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_runs_the_same_tensor_operations_as_that_of_a_hand_written_loop(accumulate: int) -> None:
    ours, by_hand = Operations(), Operations()
    train_with_paceline(ours, accumulate_grad_batches=accumulate, **NO_EXTRAS)
    train_by_hand(by_hand, accumulate)
    assert ours.usual(accumulate) == by_hand.usual(accumulate)


def test_a_logged_loss_adds_views_alone_to_the_tensor_operations_of_a_step() -> None:
    logging, silent = Operations(), Operations()
    train_with_paceline(logging, logs=True)
    train_with_paceline(silent, **NO_EXTRAS)
    added = logging.usual() - silent.usual()
    assert set(added) == {"aten.detach.default"}, added


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: only there is reading a tensor a wait")
@pytest.mark.parametrize("accumulate", [1, 4])
def test_no_step_waits_for_the_gpu(accumulate: int) -> None:
    train_with_paceline(
        HostSyncs(),
        logs=True,
        accelerator="cuda",
        log_every_n_steps=3,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
    )
