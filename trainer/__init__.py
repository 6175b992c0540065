"""The training loop and all that it needs. Start reading at `loop.py`; `trainer.py` is the edge to the rest.

    the loop         loop, stepping, windows, schedules, evaluate, control, agreed_clock, state
    around it        trainer, arguments, argument_types, properties, stages, hooks, compiling, backend_flags
    for users        module, datamodule, callback, hparams, optim, optimizer_handle, rng
    data             plan, data, streamed_data, evaluation_data, loaders, iterables, combined, positions, prefetch,
                     fingerprint
    what is logged   metrics, entries, reduction, metric_objects
    checkpoints      checkpoint/, switches, verify
    processes        launch, agent, meeting, signals, faults, verdict, rank_zero
    the command      cli, cli_checkpoint, estimating

The names below are the public ones of this package; all of them are also names of `paceline` itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = [
    "Callback",
    "CombinedLoader",
    "DataModule",
    "Module",
    "Trainer",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "seed_everything",
]

if TYPE_CHECKING:
    from .callback import Callback
    from .combined import CombinedLoader
    from .datamodule import DataModule
    from .module import Module
    from .rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
    from .rng import seed_everything
    from .trainer import Trainer
else:
    from .._lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Callback": ".callback",
            "CombinedLoader": ".combined",
            "DataModule": ".datamodule",
            "Module": ".module",
            "Trainer": ".trainer",
            "rank_zero_info": ".rank_zero",
            "rank_zero_only": ".rank_zero",
            "rank_zero_warn": ".rank_zero",
            "seed_everything": ".rng",
        },
    )
