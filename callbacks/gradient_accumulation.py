"""`GradientAccumulationScheduler`: another accumulation from some epochs on, through the trainer's public knob."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from ..trainer.arguments import check_count
from ..trainer.callback import Callback

if TYPE_CHECKING:
    from ..trainer.module import Module
    from ..trainer.trainer import Trainer


class GradientAccumulationScheduler(Callback):
    """Sets `trainer.accumulate_grad_batches` as epochs begin: `{0: 8, 4: 4}` is 8 in epochs 0 to 3, then 4.

    `scheduling` maps epochs, counted from 0, to micro-batches of a rank in a window; before the first it is 1.
    Raises ConfigurationError beside `Trainer(accumulate_grad_batches=...)`, which says the same thing.
    """

    def __init__(self, scheduling: Mapping[int, int]) -> None:
        if not scheduling or not isinstance(scheduling, Mapping):
            raise ConfigurationError(f"scheduling={scheduling!r}: give epochs and factors, as in {{0: 8, 4: 4}}.")
        for epoch, factor in scheduling.items():
            check_count("scheduling: epoch", epoch, 0)
            check_count("scheduling: micro-batches", factor)
        self.scheduling = {0: 1, **scheduling}
        self.epochs = sorted(self.scheduling)

    def going_to_accumulate_grad_batches(self) -> bool:
        """Whether any epoch accumulates."""
        return any(factor > 1 for factor in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """The factor of `epoch`."""
        return self.scheduling[max(start for start in self.epochs if start <= epoch)]

    def estimated_steps(
        self, max_epochs: int | None, max_steps: int, batches: int | float, otherwise: int | float
    ) -> int | float:
        """Optimizer steps of a whole run with `batches` micro-batches an epoch; `otherwise` where no one can tell."""
        if max_epochs is None or max_epochs < 0 or batches == math.inf:
            return otherwise
        steps = sum(math.ceil(batches / self.get_accumulate_grad_batches(epoch)) for epoch in range(max_epochs))
        return steps if max_steps == -1 else min(steps, max_steps)

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ConfigurationError(
                "GradientAccumulationScheduler cannot be used with manual optimization: call manual_backward several "
                "times before step() in training_step."
            )
        if trainer.accumulate_grad_batches != 1:
            raise ConfigurationError(
                f"accumulate_grad_batches={trainer.accumulate_grad_batches} and a GradientAccumulationScheduler "
                "contradict each other. Leave one out."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)
