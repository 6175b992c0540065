"""`Callback`: what may be added to a run without changing its loop.

Override the hooks you need; the others are never called. The order in which they run is the table in
docs of the hooks and, in code, `loop.py` and `evaluate.py`. It is defined here, where the loop that calls it
lives, and is public as `paceline.Callback`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from .module import Module
    from .trainer import Trainer


class Callback:
    """Subclass it, override hooks, pass the object to `Trainer(callbacks=[...])`.

    A method whose name is close to a hook's, but is none, is refused when the trainer is built.
    """

    _module: Module | None = None

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint; two callbacks of one class need different keys."""
        return type(self).__qualname__

    def _generate_state_key(self, **kwargs: Any) -> str:
        """A `state_key` of the class and what tells its objects apart."""
        return f"{type(self).__qualname__}{kwargs!r}"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know: numbers, strings, lists, dicts and tensors."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """`Module.log`, for callbacks."""
        self._logging_module().log(name, value, *args, **options)

    def log_dict(self, dictionary: Any, *args: Any, **options: Any) -> None:
        """`Module.log_dict`, for callbacks."""
        self._logging_module().log_dict(dictionary, *args, **options)

    def _logging_module(self) -> Module:
        if self._module is None:
            raise RuntimeError(f"{type(self).__name__}.log() works while a Trainer runs; no run is under way.")
        return self._module

    # --- the frame of every run --------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Before the module's own `setup`; `stage` is "fit", "validate", "test" or "predict"."""

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """After everything, also after an exception."""

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        """An exception ends the run; it is raised again after the teardown."""

    def on_log(self, trainer: Trainer, pl_module: Module, metrics: dict[str, float], step: int) -> None:
        """A logged point arrived: host floats reduced over the ranks, with `epoch` and `samples`; `step` is theirs.

        Called on every rank, some steps after `step` where the device or other ranks had to be waited for.
        """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Before `checkpoint` is written; edits to it are honoured."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Before the callback's own state is loaded."""

    # --- fit ---------------------------------------------------------------------------------------------------
    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        """The optimizers exist, the module is in its place."""

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        """After `on_train_end`."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Before the two validation batches that run ahead of training."""

    def on_sanity_check_end(self, trainer: Trainer, pl_module: Module) -> None:
        """After them; the random state is put back afterwards."""

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Before the first epoch of this call."""

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        """After the last epoch of this call."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Before the first batch of an epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """After the last batch and the validation of an epoch."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> int | None:
        """Before a micro-batch; returning -1 on every rank skips the rest of the epoch."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a micro-batch and, on the last of a window, after the optimizer's step."""

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Module, optimizer: Optimizer) -> None:
        """Before the gradients of a new window are cleared."""

    def on_before_backward(self, trainer: Trainer, pl_module: Module, loss: Tensor) -> None:
        """Before the backward pass of a micro-batch; `loss` is scaled by its share of the window."""

    def on_after_backward(self, trainer: Trainer, pl_module: Module) -> None:
        """After the backward pass of a micro-batch."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Module, optimizer: Optimizer) -> None:
        """The window's gradients are whole, and not clipped yet."""

    # --- validate; test and predict have the same hooks ----------------------------------------------------------
    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Before an evaluation."""

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        """After an evaluation; its metrics are in `trainer.callback_metrics`."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Before the first batch of an evaluation."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """After the last batch of an evaluation, before the metrics are reduced."""

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before a batch of an evaluation."""

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """After a batch of an evaluation; `outputs` is what the step returned."""

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end
    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
