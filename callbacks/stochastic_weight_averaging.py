"""`StochasticWeightAveraging`: the mean of the weights of the last epochs, trained with a rate of their own.

Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization" (arXiv:1803.05407). As Lightning
does, the mean is taken as epochs begin, so the first one in it is that from before the rate was changed, and what the
last epoch trains is in no mean. It becomes the module's weights when the last epoch is done: checkpoints of that epoch
are from before; `trainer.save_checkpoint` after `fit` saves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import SWALR

from ..errors import ConfigurationError
from ..trainer.argument_types import checked_types
from ..trainer.arguments import check_count
from ..trainer.callback import Callback
from ..trainer.hooks import without_missing
from ..trainer.metric_objects import modes_kept, untouched
from ..trainer.optim import SchedulerConfig
from ..trainer.rank_zero import rank_zero_info, rank_zero_warn
from ..trainer.rng import isolated
from .averaged_weights import AveragedWeights, AverageFunction

if TYPE_CHECKING:
    from ..trainer.module import Module
    from ..trainer.trainer import Trainer


class StochasticWeightAveraging(Callback):
    """From epoch `swa_epoch_start` on (a number from 1, or a share of `max_epochs`) the weights are averaged.

    From there the rates go to `swa_lrs` (one, or one a parameter group) in `annealing_epochs`, by `annealing_strategy`
    "cos" or "linear", in the place of the module's own scheduler. `avg_fn(averaged, current, count)` as in torch's
    AveragedModel; by default all weigh the same. `device` is where the average is kept (None: beside the weights).
    BatchNorm's statistics are those of one more pass over the training data, by `training_step` without gradients.
    """

    @checked_types
    def __init__(
        self,
        swa_lrs: float | Sequence[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: Literal["cos", "linear"] = "cos",
        avg_fn: AverageFunction | None = None,
        device: torch.device | str | None = "cpu",
    ) -> None:
        _check_arguments(swa_lrs, swa_epoch_start, annealing_strategy, avg_fn)
        self._swa_lrs = swa_lrs
        self._swa_epoch_start = swa_epoch_start
        self._annealing_epochs = check_count("annealing_epochs", annealing_epochs, 0)
        self._annealing_strategy: Literal["cos", "linear"] = annealing_strategy
        self._avg_fn = avg_fn
        self._device = None if device is None else torch.device(device)
        self._max_epochs = 0
        self._loaded: dict[str, Any] | None = None
        self._forget()

    def _forget(self) -> None:
        self._average: AveragedWeights | None = None
        self._anneals = False
        self._latest_update_epoch = -1

    @property
    def swa_start(self) -> int:
        """The first epoch that is averaged, counted from 0; known while `fit` runs."""
        start = self._swa_epoch_start
        return max((int(self._max_epochs * start) if isinstance(start, float) else start) - 1, 0)

    @property
    def swa_end(self) -> int:
        """The last epoch, counted from 0; known while `fit` runs."""
        return self._max_epochs - 1

    # --- the mean ------------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage != "fit":
            return
        self._forget()
        if trainer.max_epochs in (None, -1):
            raise ConfigurationError(
                "StochasticWeightAveraging must know the last epoch: give Trainer(max_epochs=...)."
            )
        if not pl_module.automatic_optimization:
            raise ConfigurationError(
                "StochasticWeightAveraging sets learning rates and repeats training_step for BatchNorm, which manual "
                "optimization does not allow. Use WeightAveraging."
            )
        self._max_epochs = int(trainer.max_epochs or 0)

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if len(trainer.lr_scheduler_configs) > 1:
            raise ConfigurationError(
                f"StochasticWeightAveraging takes the place of one scheduler, and there are "
                f"{len(trainer.lr_scheduler_configs)}. Chain them (torch.optim.lr_scheduler.SequentialLR)."
            )
        state, self._loaded = self._loaded, None
        if state is None:
            return
        self._latest_update_epoch = state["latest_update_epoch"]
        if state["n_averaged"]:
            self._average = AveragedWeights(pl_module, self._device, buffers=False)
            self._average.load(state["average"])
            self._average.count = state["n_averaged"]
        if state["anneals"]:
            self._anneal(trainer)  # before the states of the schedulers are loaded

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        epoch = trainer.current_epoch
        if not self.swa_start <= epoch <= self.swa_end or epoch <= self._latest_update_epoch:
            return
        if not self._anneals:
            if epoch != self.swa_start:
                rank_zero_warn(
                    f"StochasticWeightAveraging begins in epoch {epoch}, after its start {self.swa_start}: the run "
                    "that this one goes on from did not average."
                )
            self._anneal(trainer)
        if self._average is None:
            self._average = AveragedWeights(pl_module, self._device, buffers=False)
        else:
            self._average.update(pl_module, self._avg_fn)
        self._latest_update_epoch = epoch

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._average is None or trainer.current_epoch - 1 != self.swa_end:
            return
        self._average.put(pl_module, self._average.tensors)
        _renew_batch_norm(trainer, pl_module)

    # --- the rates ---------------------------------------------------------------------------------------------
    def _anneal(self, trainer: Trainer) -> None:
        """Put a scheduler that goes to `swa_lrs` in the place of the module's own."""
        optimizer = trainer.optimizers[0]
        rates, groups = self._swa_lrs, len(optimizer.param_groups)
        rates = [float(rates)] * groups if isinstance(rates, (int, float)) else list(rates)
        if len(rates) != groups:
            raise ConfigurationError(f"swa_lrs has {len(rates)} rates and the optimizer {groups} parameter groups.")
        scheduler = SWALR(
            optimizer,
            swa_lr=rates,  # type: ignore[arg-type]
            anneal_epochs=self._annealing_epochs,
            anneal_strategy=self._annealing_strategy,
        )
        if trainer.lr_scheduler_configs:
            replaced = type(trainer.lr_scheduler_configs[0].scheduler).__name__
            rank_zero_info(f"Swapping scheduler {replaced} for {type(scheduler).__name__}.")
        trainer.lr_scheduler_configs[:1] = [SchedulerConfig(scheduler)]
        self._anneals = True

    # --- what a resumed run must know ------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded
        return {
            "n_averaged": 0 if self._average is None else self._average.count,
            "latest_update_epoch": self._latest_update_epoch,
            "anneals": self._anneals,
            "average": {} if self._average is None else self._average.tensors,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict)


def _renew_batch_norm(trainer: Trainer, module: Module) -> None:
    """Let BatchNorm layers find the statistics of the module's present weights: the mean over all ranks' batches."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if not layers or trainer.fit_run is None:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a mean in which all batches weigh the same
    synchronized = any(isinstance(layer, nn.SyncBatchNorm) for layer in layers)
    step = trainer.strategy.evaluation_step(without_missing(module.training_step, 2, "batch_idx"))
    with torch.no_grad(), isolated(), trainer.metrics.silent(), untouched(module), modes_kept(module):
        module.train()
        batch_idx = 0
        for window in trainer.fit_run.data.windows(trainer.current_epoch):
            for weight, batch in zip(window.weights, islice(window.batches, len(window.weights)), strict=False):
                if weight != 0.0 or synchronized:
                    step(batch, batch_idx)
                batch_idx += 1
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    if trainer.world_size > 1 and not synchronized:
        for layer in layers:
            _average_over_ranks(trainer, layer)


def _average_over_ranks(trainer: Trainer, layer: _BatchNorm) -> None:
    mean, variance, count = layer.running_mean, layer.running_var, layer.num_batches_tracked
    assert mean is not None and variance is not None and count is not None
    for statistic in (mean, variance):
        statistic.mul_(count)
        trainer.strategy.all_reduce(statistic)
    trainer.strategy.all_reduce(count)
    for statistic in (mean, variance):
        statistic.div_(count.clamp(min=1))


def _check_arguments(swa_lrs: Any, swa_epoch_start: Any, annealing_strategy: Any, avg_fn: Any) -> None:
    rates = list(swa_lrs) if isinstance(swa_lrs, (list, tuple)) else [swa_lrs]
    if not rates or not all(isinstance(r, (int, float)) and not isinstance(r, bool) and r > 0 for r in rates):
        raise ConfigurationError(f"swa_lrs={swa_lrs!r}: expected a positive number, or a list of them.")
    is_share = isinstance(swa_epoch_start, float) and 0 <= swa_epoch_start <= 1
    is_epoch = isinstance(swa_epoch_start, int) and not isinstance(swa_epoch_start, bool) and swa_epoch_start >= 1
    if not is_share and not is_epoch:
        raise ConfigurationError(
            f"swa_epoch_start={swa_epoch_start!r}: expected an epoch (an int from 1) or a share of them (a float from "
            "0 to 1)."
        )
    if annealing_strategy not in ("cos", "linear"):
        raise ConfigurationError(f"annealing_strategy={annealing_strategy!r}: use 'cos' or 'linear'.")
    if avg_fn is not None and not callable(avg_fn):
        raise ConfigurationError(
            f"avg_fn={avg_fn!r:.80} cannot be called. Give a function of (averaged, current, count)."
        )
