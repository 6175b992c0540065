"""`EarlyStopping`: stop when a metric has not improved for a while.

The metric is the same on every rank, so every rank comes to the same verdict at the same place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..trainer.argument_types import checked_types
from ..trainer.arguments import check_count
from ..trainer.callback import Callback
from ..trainer.rank_zero import rank_zero_info, rank_zero_warn
from .monitored import Watch, never_logged

if TYPE_CHECKING:
    from ..trainer.module import Module
    from ..trainer.trainer import Trainer


class EarlyStoppingReason(IntEnum):
    """Why a run was stopped."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(Callback):
    """Stops `fit` after `patience` checks in a row in which `monitor` did not improve by more than `min_delta`.

    A check happens after each validation, or at the end of each training epoch with `check_on_train_epoch_end` (None:
    found from the Trainer). It stops at once where the metric is NaN or infinite (`check_finite`), better than
    `stopping_threshold` or worse than `divergence_threshold`. With `strict` a metric that was not logged is an error.
    `wait_count`, `stopped_epoch`, `best_score`, `stopping_reason` and `stopping_reason_message` tell where it stands.
    """

    acts_on_metrics = True
    mode_dict = {"min": torch.lt, "max": torch.gt}  # noqa: RUF012 (read by users' subclasses)
    order_dict = {"min": "<", "max": ">"}  # noqa: RUF012

    @checked_types
    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:
        if mode not in self.mode_dict:
            raise ConfigurationError(f"EarlyStopping: `mode` can be 'min' or 'max', but got {mode!r}.")
        self.monitor = monitor
        self.mode = mode
        self.min_delta = min_delta if mode == "max" else -min_delta
        self.patience = check_count("EarlyStopping: patience", patience, 0)
        self.verbose = verbose
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.log_rank_zero_only = log_rank_zero_only
        self._check_on_train_epoch_end = check_on_train_epoch_end
        self._watch = Watch()
        self._resumed = False

        self._forget()

    def _forget(self) -> None:
        """Nothing was watched yet."""
        self.wait_count = 0
        self.stopped_epoch = 0
        self.best_score = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}{{'monitor': {self.monitor!r}, 'mode': {self.mode!r}}}"

    @property
    def monitor_op(self) -> Callable[..., Tensor]:
        """`torch.lt` or `torch.gt`: whether a value is better than another."""
        return self.mode_dict[self.mode]

    # --- when --------------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._watch.start()
        if stage == "fit":
            self._forget()  # a second fit is another run, or goes on with what its checkpoint says
        if self._check_on_train_epoch_end is None:
            # Where validation runs once an epoch, the end of the epoch knows its metrics and the training's.
            self._check_on_train_epoch_end = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        """A run that was stopped stays stopped when it is resumed, unless it is to have more patience now."""
        resumed, self._resumed = self._resumed, False
        if not resumed:
            return
        exhausted = self.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
        if exhausted and self.wait_count < self.patience:
            self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        if self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED and not self._must_not_check(trainer):
            trainer.should_stop = True
            rank_zero_info(
                f"EarlyStopping had stopped this run ({self.stopping_reason.name.lower()}), so it trains no further. "
                "Raise `patience`, or leave the callback out, to go on."
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._watch.epoch_ended = True
        if self._must_not_check(trainer):
            return
        if self._check_on_train_epoch_end:
            self._run_early_stopping_check(trainer)
        else:
            self._monitored(trainer)  # what nobody logged in a whole epoch is told now

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._must_not_check(trainer):
            return
        self._watch.validated = True
        if not self._check_on_train_epoch_end:
            self._run_early_stopping_check(trainer)

    def _must_not_check(self, trainer: Trainer) -> bool:
        return trainer.state.fn != "fit" or trainer.sanity_checking or bool(trainer.fast_dev_run)

    # --- what --------------------------------------------------------------------------------------------------
    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        current = self._monitored(trainer)
        if current is None:
            return
        should_stop, reason = self._evaluate_stopping_criteria(current)
        if should_stop:
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
        if reason and (self.verbose or should_stop):
            rank_zero_info(reason)

    def _monitored(self, trainer: Trainer) -> Tensor | None:
        """The metric, global over the ranks; None where it is missing and may be."""
        metrics = trainer.reduced_metrics()
        if self.monitor in metrics:
            return metrics[self.monitor].squeeze()
        if not self._watch.may_still_come(trainer):
            error = never_logged(type(self).__name__, self.monitor, metrics)
            if self.strict:
                raise error
            if self.verbose:
                rank_zero_warn(str(error))
        return None

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        """Whether to stop, and what to tell."""
        score = float(current)
        if self.check_finite and not math.isfinite(score):
            return self._stop(
                EarlyStoppingReason.NON_FINITE_METRIC,
                f"Monitored metric {self.monitor} = {score} is not finite. Previous best value was "
                f"{float(self.best_score):.3f}. Signaling Trainer to stop.",
            )
        order = self.order_dict[self.mode]
        if self.stopping_threshold is not None and bool(self.monitor_op(current, self.stopping_threshold)):
            return self._stop(
                EarlyStoppingReason.STOPPING_THRESHOLD,
                f"Stopping threshold reached: {self.monitor} = {score} {order} {self.stopping_threshold}. "
                "Signaling Trainer to stop.",
            )
        if self.divergence_threshold is not None and bool(self.monitor_op(-current, -self.divergence_threshold)):
            return self._stop(
                EarlyStoppingReason.DIVERGENCE_THRESHOLD,
                f"Divergence threshold reached: {self.monitor} = {score} {'>' if order == '<' else '<'} "
                f"{self.divergence_threshold}. Signaling Trainer to stop.",
            )
        if bool(self.monitor_op(current - self.min_delta, self.best_score.to(current.device))):
            message = self._improvement_message(current)
            self.best_score = current.detach().clone()
            self.wait_count = 0
            return False, message
        self.wait_count += 1
        if self.wait_count < self.patience:
            return False, None
        return self._stop(
            EarlyStoppingReason.PATIENCE_EXHAUSTED,
            f"Monitored metric {self.monitor} did not improve in the last {self.wait_count} records. "
            f"Best score: {float(self.best_score):.3f}. Signaling Trainer to stop.",
        )

    def _stop(self, reason: EarlyStoppingReason, message: str) -> tuple[bool, str]:
        self.stopping_reason, self.stopping_reason_message = reason, message
        return True, message

    def _improvement_message(self, current: Tensor) -> str:
        if not bool(torch.isfinite(self.best_score)):
            return f"Metric {self.monitor} improved. New best score: {float(current):.3f}"
        by = abs(float(self.best_score) - float(current))
        return (
            f"Metric {self.monitor} improved by {by:.3f} >= min_delta = {abs(self.min_delta)}. "
            f"New best score: {float(current):.3f}"
        )

    # --- what a resumed run must know ------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "patience": self.patience,
            "stopping_reason": int(self.stopping_reason),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        self.best_score = torch.as_tensor(state_dict["best_score"])
        self._resumed = True
        self.stopping_reason = EarlyStoppingReason(state_dict.get("stopping_reason", 0))
