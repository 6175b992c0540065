"""What only rank 0 does: printing, warning, writing.

    @rank_zero_only
    def save_table(path): ...

    rank_zero_info("seed %d", seed)

The rank is read from the environment each time it is needed, so these work before there is a Trainer and in a program
that has none. A Trainer sets `rank_zero_only.rank`, which then counts.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
"""Where torchrun, srun and mpirun say a process's rank; the first that is set counts."""

_log = logging.getLogger("paceline")


class _RankZeroOnly:
    """The decorator `rank_zero_only`: the function does nothing and returns `default` on all ranks but 0."""

    def __init__(self) -> None:
        self._rank: int | None = None

    @property
    def rank(self) -> int:
        """This process's rank: the one that was set, or else the launcher's, or else 0."""
        if self._rank is not None:
            return self._rank
        return next((int(os.environ[name]) for name in _RANK_VARIABLES if name in os.environ), 0)

    @rank.setter
    def rank(self, rank: int | None) -> None:
        self._rank = rank

    def __call__(self, function: Callable[P, R], default: R | None = None) -> Callable[P, R | None]:
        @functools.wraps(function)
        def on_rank_zero(*args: P.args, **kwargs: P.kwargs) -> R | None:
            return function(*args, **kwargs) if self.rank == 0 else default

        return on_rank_zero


rank_zero_only = _RankZeroOnly()


def rank_zero_info(message: object, *args: object, stacklevel: int = 1) -> None:
    """Log to the logger "paceline" on rank 0; `stacklevel` counts from the line that calls this."""
    if rank_zero_only.rank == 0:
        _log.info(message, *args, stacklevel=stacklevel + 1)


def rank_zero_warn(message: Warning | str, category: type[Warning] = UserWarning, stacklevel: int = 1) -> None:
    """`warnings.warn` on rank 0; `stacklevel=1` blames the line that calls this, 2 the caller of that function."""
    if rank_zero_only.rank == 0:
        warnings.warn(message, category, stacklevel=stacklevel + 1)
