"""`WeightAveraging` and `EMAWeightAveraging`: an average of the weights is evaluated, saved and left at the end.

Training itself goes on with its own weights: they are swapped out for validation and put back after it, whatever
happens in it. A checkpoint's weights are the averaged ones; those of training are in this callback's state, so that a
resumed run is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..errors import ConfigurationError
from ..trainer.argument_types import checked_types
from ..trainer.arguments import check_count
from ..trainer.callback import Callback
from ..trainer.state import TrainerFn
from .averaged_weights import AveragedWeights, AverageFunction, MultiAverageFunction

if TYPE_CHECKING:
    from ..trainer.module import Module
    from ..trainer.trainer import Trainer


class WeightAveraging(Callback):
    """Averages the weights after every update; override `should_update` for other moments.

    `avg_fn(averaged, current, count)` or `multi_avg_fn(list, list, count)` as in torch's AveragedModel; by default all
    weigh the same. `device` is where the average is kept (None: beside the weights; "cpu" costs a copy an update).
    Without `use_buffers` only parameters are averaged, and buffers are those of training. Before its first update there
    is no average, and everything goes on as without this callback.
    """

    #: Checkpoints of weights alone must be changed too.
    changes_saved_weights = True

    @checked_types
    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        avg_fn: AverageFunction | None = None,
        multi_avg_fn: MultiAverageFunction | None = None,
    ) -> None:
        if avg_fn is not None and multi_avg_fn is not None:
            raise ConfigurationError("avg_fn and multi_avg_fn do the same thing. Give one of them.")
        self._device = None if device is None else torch.device(device)
        self._use_buffers = use_buffers
        self._avg_fn = avg_fn
        self._multi_avg_fn = multi_avg_fn
        self._loaded: dict[str, Any] | None = None
        self._forget()

    def _forget(self) -> None:
        self._average: AveragedWeights | None = None
        self._swapped = False  # the module has the average, `_average` the weights of training
        self._latest_update_step = 0
        self._latest_update_epoch = -1
        self._seen_step = 0

    # --- when --------------------------------------------------------------------------------------------------
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to average now: asked after each update, with its index, and after each epoch, with its index.

        Both count from 0; the other one is None.
        """
        return step_idx is not None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._seen_step:  # inside a window
            return
        self._seen_step = step
        if self.should_update(step_idx=step - 1):
            self._update(pl_module)
            self._latest_update_step = step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        epoch = trainer.current_epoch
        if epoch > self._latest_update_epoch and self.should_update(epoch_idx=epoch):
            self._update(pl_module)
            self._latest_update_epoch = epoch

    def _update(self, pl_module: Module) -> None:
        if self._average is None:
            self._average = AveragedWeights(pl_module, self._device, self._use_buffers)
        else:
            self._average.update(pl_module, self._avg_fn, self._multi_avg_fn)

    # --- in and out of the module --------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage == "fit":
            self._forget()

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self._loaded is not None:
            self._take_back(pl_module, self._loaded)
            self._loaded = None
        self._seen_step = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap(pl_module, True)
            trainer.strategy.sync_buffers()  # each rank averaged its own; checkpoints hold those of rank 0

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap(pl_module, False)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._swap(pl_module, True)

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._swap(pl_module, True)  # where there was nothing left to train

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap(pl_module, False)

    def _swap(self, pl_module: Module, averaged: bool) -> None:
        """Give the module the averaged weights, or those of training."""
        if self._average is not None and self._swapped != averaged:
            self._average.swap(pl_module)
            self._swapped = averaged

    # --- checkpoints -----------------------------------------------------------------------------------------------
    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        if self._average is None or self._swapped:
            return
        weights = checkpoint["state_dict"]
        for name, held in self._average.all_names(pl_module):
            if name in weights:
                weights[name] = self._average.tensors[held]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:  # the module's weights are others from now on
            self._forget()

    def state_dict(self) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded
        state: dict[str, Any] = {
            "latest_update_step": self._latest_update_step,
            "latest_update_epoch": self._latest_update_epoch,
        }
        module, average = self._module, self._average
        if average is None or module is None:
            return state
        of_module = {name: tensor.detach() for name, tensor in average.named(module)}
        training, averaged = (average.tensors, of_module) if self._swapped else (of_module, average.tensors)
        saved_with_module = set(module.state_dict())
        return {
            **state,
            "count": average.count,
            "training_weights": training,
            "averaged": {name: tensor for name, tensor in averaged.items() if name not in saved_with_module},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict)

    def _take_back(self, pl_module: Module, state: dict[str, Any]) -> None:
        """The module has the averaged weights, from the checkpoint: give it those of training, and keep the average."""
        self._latest_update_step = state["latest_update_step"]
        self._latest_update_epoch = state["latest_update_epoch"]
        if "count" in state:
            self._average = AveragedWeights(pl_module, self._device, self._use_buffers)
            self._average.load(state["averaged"])
            self._average.count = state["count"]
            self._average.put(pl_module, state["training_weights"])


class EMAWeightAveraging(WeightAveraging):
    """The exponential moving average: `decay` of what was, the rest of what is.

    An update is made every `update_every_n_steps` (0: none by steps) from step `update_starting_at_step` on (counted
    from 0), and after each epoch from `update_starting_at_epoch` on, if given.
    """

    @checked_types
    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ConfigurationError(f"decay={decay!r}: expected a number from 0 to 1, usually close to 1.")
        super().__init__(device, use_buffers, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.decay = decay
        self.update_every_n_steps: int = check_count("update_every_n_steps", update_every_n_steps, 0)
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """See WeightAveraging."""
        if step_idx is not None and self.update_every_n_steps and step_idx >= (self.update_starting_at_step or 0):
            return step_idx % self.update_every_n_steps == 0
        start = self.update_starting_at_epoch
        return epoch_idx is not None and start is not None and epoch_idx >= start
