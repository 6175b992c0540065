"""`isolated`: one test, or one job of a rank, starts from the same process state and leaves none of its own behind.

Modules stay imported: their globals are the one thing that a test must put back itself.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed

SEED = 0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def isolated(folder: Path) -> Iterator[None]:
    """Run the body in `folder` with all seeds set and one thread; put the process back as it was, whatever happens.

    Put back are the environment, the folder, `sys.argv`, `sys.path`, signal handlers and torch's global settings;
    a process group that was left is destroyed. For the main thread only (signal handlers).
    """
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))
        stack.enter_context(mock.patch.object(sys, "argv", list(sys.argv)))
        stack.enter_context(mock.patch.object(sys, "path", list(sys.path)))
        stack.enter_context(_working_in(folder))
        stack.enter_context(_signal_handlers_kept())
        stack.enter_context(_torch_settings_kept())
        stack.callback(destroy_process_group)
        seed_everything()
        torch.set_num_threads(1)
        yield


def seed_everything() -> None:
    """Seed every generator that is there, the same on every rank."""
    random.seed(SEED)
    torch.manual_seed(SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)


def destroy_process_group() -> None:
    """End the process group that a test or a job left, if any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()  # a DDP model is a cycle; while it lives, so do the connections to the other ranks


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:  # None: not Python's
                signal.signal(number, handler)


@contextmanager
def _torch_settings_kept() -> Iterator[None]:
    dtype, grad_enabled = torch.get_default_dtype(), torch.is_grad_enabled()
    deterministic = _deterministic()
    matmul_precision, cudnn_benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad_enabled)
        if _deterministic() != deterministic:  # asked first: the call imports torch's compiler, which takes 2 s
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.set_float32_matmul_precision(matmul_precision)
        torch.backends.cudnn.benchmark = cudnn_benchmark


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
