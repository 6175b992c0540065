"""Paceline: a callback-based trainer for PyTorch.

`import paceline as pl` gives every name that most programs need:

    class Digits(pl.Module):
        def training_step(self, batch, batch_idx):
            images, labels = batch
            return F.cross_entropy(self(images), labels)

    pl.Trainer(max_epochs=10, callbacks=[pl.callbacks.EarlyStopping("val_loss")]).fit(Digits(), train_loader)

Names load on first use: importing the package imports nothing heavy, not even torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"  # the one source of the version: setup.cfg reads it here

__all__ = [
    "Callback",
    "CheckpointError",
    "CombinedLoader",
    "ConfigurationError",
    "DataModule",
    "LaunchError",
    "LightningDataModule",
    "LightningModule",
    "Module",
    "PacelineError",
    "Trainer",
    "UnknownArgumentError",
    "__version__",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "seed_everything",
]

if TYPE_CHECKING:
    from . import callbacks as callbacks
    from . import errors as errors
    from . import loggers as loggers
    from . import strategies as strategies
    from . import trainer as trainer
    from .errors import CheckpointError, ConfigurationError, LaunchError, PacelineError, UnknownArgumentError
    from .trainer.callback import Callback
    from .trainer.combined import CombinedLoader
    from .trainer.datamodule import DataModule
    from .trainer.datamodule import DataModule as LightningDataModule
    from .trainer.module import Module
    from .trainer.module import Module as LightningModule
    from .trainer.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
    from .trainer.rng import seed_everything
    from .trainer.trainer import Trainer
else:
    from ._lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Callback": ".trainer.callback",
            "CheckpointError": ".errors",
            "CombinedLoader": ".trainer.combined",
            "ConfigurationError": ".errors",
            "DataModule": ".trainer.datamodule",
            "LaunchError": ".errors",
            "LightningDataModule": ".trainer.datamodule:DataModule",
            "LightningModule": ".trainer.module:Module",
            "Module": ".trainer.module",
            "PacelineError": ".errors",
            "Trainer": ".trainer.trainer",
            "UnknownArgumentError": ".errors",
            "rank_zero_info": ".trainer.rank_zero",
            "rank_zero_only": ".trainer.rank_zero",
            "rank_zero_warn": ".trainer.rank_zero",
            "seed_everything": ".trainer.rng",
        },
        submodules=("callbacks", "errors", "loggers", "strategies", "trainer"),
    )
