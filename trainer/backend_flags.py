"""torch's global switches that `Trainer(deterministic=, benchmark=)` turns while a call runs, and puts back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def backend_flags(deterministic: bool | str | None, benchmark: bool | None) -> Iterator[None]:
    """Inside, torch's algorithms are deterministic ("warn": it tells where it has none) and cuDNN measures or not.

    None leaves a switch as it is; deterministic ones switch cuDNN's measuring off unless `benchmark` asks for it.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    measuring, workspace = torch.backends.cudnn.benchmark, os.environ.get(_CUBLAS)
    if deterministic is not None:
        torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
    if deterministic:
        os.environ.setdefault(_CUBLAS, ":4096:8")  # without it cuBLAS's sums are in another order each time
    if benchmark is not None or deterministic:
        torch.backends.cudnn.benchmark = bool(benchmark)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = measuring
        if workspace is None:
            os.environ.pop(_CUBLAS, None)
