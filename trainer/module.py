"""`Module`: a torch.nn.Module that says what one step is. Users subclass it; the loop calls it.

Read the steps first, then the hooks in the order in which `loop.py` calls them, then what a step may use
(`log`, `optimizers`, `all_gather`, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from ..errors import ConfigurationError, WrongTypeError
from .datamodule import DataHooks
from .hparams import HyperParameters, on_class_only
from .optimizer_handle import toggle_optimizer, untoggle_optimizer
from .rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from .trainer import Trainer


def _of_trainer(name: str, alone: Any) -> Any:
    """What the trainer says; `alone` without one."""
    return property(lambda module: alone if module._trainer is None else getattr(module._trainer, name))


class Module(HyperParameters, DataHooks, nn.Module):
    """Subclass it: layers in `__init__`, `training_step`, `configure_optimizers`, and whatever hooks you need."""

    CHECKPOINT_HYPER_PARAMS_KEY: ClassVar[str] = "hyper_parameters"
    automatic_optimization: bool = True
    example_input_array: Any = None
    prepare_data_per_node: bool = True
    strict_loading: bool = True
    """Whether a checkpoint must have the weights of this module, no more and no fewer."""
    _trainer: Trainer | None = None

    # --- steps -------------------------------------------------------------------------------------------------
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss of a batch: a scalar tensor, a dict with "loss", or None to skip it."""
        raise NotImplementedError("training_step is not defined")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Evaluate a validation batch; log what matters."""
        raise NotImplementedError("validation_step is not defined")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Evaluate a test batch; log what matters."""
        raise NotImplementedError("test_step is not defined")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The prediction for a batch; by default what `forward` returns."""
        return self(batch)

    def loss_weight(self, batch: Any) -> float | Tensor:
        """How many items (tokens, boxes, ...) the mean loss of this host batch stands for; a number or 0-d tensor.

        By default the number of samples; then this method is not called.
        """
        raise NotImplementedError("loss_weight is not defined")

    # --- set-up ------------------------------------------------------------------------------------------------
    def configure_optimizers(self) -> Any:
        """One optimizer, a list of them, (optimizers, schedulers), a dict with "optimizer" and "lr_scheduler", a
        tuple of such dicts, or None."""
        return None

    def configure_model(self) -> None:
        """Build layers here that should be built under the strategy; called once a call, so make it idempotent."""

    def configure_callbacks(self) -> Any:
        """Callbacks that this module needs; one of a type given to the trainer is replaced."""
        return []

    def setup(self, stage: str) -> None:
        """Called on every rank; `stage` is fit, validate, test or predict."""

    def teardown(self, stage: str) -> None:
        """Called on every rank at the end."""

    # --- hooks of fit, in the order of a step --------------------------------------------------------------------
    def on_fit_start(self) -> None:
        """The optimizers exist, the module is in its place."""

    def on_fit_end(self) -> None:
        """After `on_train_end`."""

    def on_train_start(self) -> None:
        """Before the first epoch of this call."""

    def on_train_end(self) -> None:
        """After the last epoch of this call."""

    def on_train_epoch_start(self) -> None:
        """Before the first batch of an epoch."""

    def on_train_epoch_end(self) -> None:
        """After the last batch and the validation of an epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Before a micro-batch; returning -1 on every rank skips the rest of the epoch."""

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Before the gradients of a new window are cleared."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear the gradients of a new window."""
        optimizer.zero_grad()

    def on_before_backward(self, loss: Tensor) -> None:
        """Before the backward pass; `loss` is scaled by its share of the window."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The backward pass."""
        loss.backward(*args, **kwargs)

    def on_after_backward(self) -> None:
        """After the backward pass of a micro-batch."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The window's gradients are whole, and not clipped yet."""

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the window's gradients; call `self.clip_gradients`, or do it by hand."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step; `optimizer_closure()` returns the window's loss, computed already; calling it again repeats it."""
        optimizer.step(optimizer_closure)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a scheduler; `metric` is the monitored one, or None."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a micro-batch and, on the last of a window, after the optimizer's step."""

    # --- hooks of validation; test and predict have the same ------------------------------------------------------
    def on_validation_model_eval(self) -> None:
        """Put the module into evaluation mode."""
        self.eval()

    def on_validation_model_train(self) -> None:
        """Put every layer back into the mode it had."""
        for module, training in self.__dict__.pop("_modes", ()):
            module.training = training

    def on_validation_model_zero_grad(self) -> None:
        """Before validation inside `fit`; gradients are cleared by the next window anyway."""

    def on_validation_start(self) -> None:
        """Before an evaluation."""

    def on_validation_end(self) -> None:
        """After an evaluation; its metrics are in `self.trainer.callback_metrics`."""

    def on_validation_epoch_start(self) -> None:
        """Before the first batch of an evaluation."""

    def on_validation_epoch_end(self) -> None:
        """After the last batch of an evaluation, before the metrics are reduced."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before a batch of an evaluation."""

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After a batch of an evaluation; `outputs` is what the step returned."""

    on_test_model_eval = on_predict_model_eval = on_validation_model_eval
    on_test_model_train = on_predict_model_train = on_validation_model_train
    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end
    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    # --- checkpoints ---------------------------------------------------------------------------------------------
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before `checkpoint` is written; edits to it are honoured."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before weights and states are taken from `checkpoint`; edits to it are honoured."""

    @on_class_only
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """A module with the weights and hyper-parameters of a checkpoint; `kwargs` override hyper-parameters.

        Reads our checkpoints, safetensors files and Lightning's `.ckpt` (without executing anything: `weights_only`,
        accepted for Lightning's sake, changes nothing).
        Raises CheckpointError for what is no checkpoint, ConfigurationError for missing arguments.
        """
        from .checkpoint.modules import load_module

        return load_module(cls, checkpoint_path, map_location, hparams_file, strict, kwargs)

    # --- what a step may use -------------------------------------------------------------------------------------
    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log a single number: a tensor (never read back here), a float, or a torchmetrics.Metric.

        `on_step` and `on_epoch` default to what suits the hook. Epoch values are means weighted with `batch_size`
        (found from the batch), or `reduce_fx` "sum", "min", "max", always over all ranks: `sync_dist` changes nothing.
        """
        if self._trainer is None:
            rank_zero_warn(f"log({name!r}): the module is not attached to a Trainer, nothing is logged.")
            return
        arguments = (
            name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, batch_size, add_dataloader_idx, rank_zero_only
        )  # fmt: skip
        if torch.compiler.is_compiling():  # in a compiled forward; traced, it would be compiled anew at each step
            _call_uncompiled(self._trainer.metrics.log, *arguments)
        else:
            self._trainer.metrics.log(*arguments)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **options: Any) -> None:
        """`log` for every item, with its options; also for a torchmetrics.MetricCollection."""
        if hasattr(dictionary, "compute_groups"):
            items = dictionary.items(keep_base=False, copy_state=False)  # type: ignore[call-arg]
        else:
            items = dictionary.items()
        for name, value in items:
            self.log(name, value, *args, **options)

    def clip_gradients(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients of `optimizer` as the strategy does; the norm is logged as `grad_norm`.

        What is left out is what the Trainer was given. Raises ConfigurationError for what contradicts that.
        """
        trainer = self.trainer
        value = _agreed("gradient_clip_val", gradient_clip_val, trainer.gradient_clip_val)
        named = trainer.arguments.gradient_clip_algorithm
        algorithm = _agreed("gradient_clip_algorithm", gradient_clip_algorithm, named)
        if value:
            trainer.stepper.clip_gradients(optimizer, value, algorithm or "norm")

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizer, or the list of them, as thin wrappers whose `step` applies the precision policy."""
        handles = self.trainer.stepper.handles if use_pl_optimizer else list(self.trainer.optimizers)
        return handles[0] if len(handles) == 1 else handles

    def lr_schedulers(self) -> Any:
        """None, the scheduler, or the list of them."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if not schedulers:
            return None
        return schedulers[0] if len(schedulers) == 1 else schedulers

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Manual optimization: a backward pass whose gradients are averaged over the ranks."""
        self.trainer.stepper.backward_by_hand(loss, *args, **kwargs)

    def toggle_optimizer(self, optimizer: Optimizer) -> None:
        """Only the parameters of `optimizer` need gradients until `untoggle_optimizer`."""
        toggle_optimizer(self, optimizer, self.trainer.optimizers)
        self.trainer.strategy.trainable_changed()

    def untoggle_optimizer(self, optimizer: Optimizer) -> None:
        """Undo `toggle_optimizer`."""
        untoggle_optimizer(self, optimizer)
        self.trainer.strategy.trainable_changed()

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer) -> Iterator[None]:
        """`toggle_optimizer` before the body, `untoggle_optimizer` after it."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Tensors (in any nesting) of all ranks, each stacked to (world_size, *shape); on one rank as they are."""
        strategy = self.trainer.strategy

        def gather(item: Any) -> Any:
            tensor = item if isinstance(item, Tensor) else torch.tensor(item, device=strategy.device)
            return strategy.all_gather(tensor, sync_grads)

        return pytree.tree_map_only((Tensor, int, float), gather, data)

    def freeze(self) -> None:
        """No parameter needs gradients; evaluation mode."""
        self.requires_grad_(False).eval()

    def unfreeze(self) -> None:
        """Every parameter needs gradients; training mode."""
        self.requires_grad_(True).train()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank 0, above the progress bar."""
        if self._trainer is None:
            print(*args, **kwargs)
        else:
            self._trainer.print(*args, **kwargs)

    # --- where it runs -------------------------------------------------------------------------------------------
    @property
    def trainer(self) -> Trainer:
        """The trainer that runs this module; RuntimeError when there is none."""
        if self._trainer is None:
            raise RuntimeError(f"{type(self).__qualname__} is not attached to a `Trainer`.")
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        for module in self.modules():
            if isinstance(module, Module):
                module.__dict__["_trainer"] = trainer

    @property
    def device(self) -> torch.device:
        """Where the first parameter or buffer is."""
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return self._trainer.strategy.device if self._trainer is not None else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first floating-point parameter."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    current_epoch: int = _of_trainer("current_epoch", 0)  # epochs finished
    global_step: int = _of_trainer("global_step", 0)  # optimizer steps finished
    global_rank: int = _of_trainer("global_rank", 0)  # this process among all
    local_rank: int = _of_trainer("local_rank", 0)  # on its node
    logger: Any = _of_trainer("logger", None)  # the first one

    @property
    def on_gpu(self) -> bool:
        """True when the module is on a CUDA device."""
        return self.device.type == "cuda"

    @property
    def loggers(self) -> list[Any]:
        """All loggers."""
        return [] if self._trainer is None else self._trainer.loggers

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer": None}


def _agreed(name: str, given: Any, of_trainer: Any) -> Any:
    if given is not None and of_trainer is not None and given != of_trainer:
        raise ConfigurationError(
            f"clip_gradients({name}={given!r}) contradicts Trainer({name}={of_trainer!r}). Give it in one of the two."
        )
    return of_trainer if given is None else given


def require(module: Any) -> Module:
    """`module` if it is one, also inside `torch.compile(module)`; WrongTypeError for anything else."""
    if isinstance(module, Module):
        return module
    if isinstance(inner := getattr(module, "_orig_mod", None), Module):
        inner._compiled_call_impl = inner._compiled_call_impl or module.dynamo_ctx(inner._call_impl)
        return inner
    raise WrongTypeError(
        f"Trainer got a {type(module).__module__}.{type(module).__qualname__}, expected a subclass of paceline.Module "
        "(paceline.LightningModule). Derive your class from it and define training_step and configure_optimizers."
    )


# As torch.compiler.disable, which would import the compiler right here.
@torch._disable_dynamo  # type: ignore[attr-defined]
def _call_uncompiled(function: Callable[..., None], *args: Any) -> None:
    function(*args)
