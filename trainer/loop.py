"""The training loop. Start at `fit`; everything else in this package serves it.

    fit:           on_train_start; train_epoch until a limit is reached or a stop is agreed; on_train_end
    train_epoch:   for every window: train_window, log, validate where due, stop where agreed; then the epoch's end
    train_window:  for every micro-batch: forward, backward; then one optimizer step

A *window* is the list of micro-batches of one optimizer step. Each mean loss is scaled by its share of the window's
weight over all ranks, so the gradient is that of one big batch however it was cut. Hooks are tuples of callables,
resolved once and empty where nobody overrides them. Nothing here reads from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import ConfigurationError
from .rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from ..strategies.base import Strategy
    from .control import Control
    from .data import PlannedData
    from .hooks import Hooks
    from .metrics import Metrics
    from .schedules import Schedulers, ValidationTimes
    from .state import Limits, Progress
    from .stepping import Stepper
    from .streamed_data import StreamedData
    from .windows import Window


@dataclass
class Fit:
    """All that training touches, resolved once before it starts.

    `reload_data` and `prepare_epoch` set what may change between epochs: `data`, `num_batches`, `training_step`.
    `ghost_step` is the step for a micro-batch that a rank without samples repeats to keep up: nothing of it counts.
    """

    strategy: Strategy
    hooks: Hooks
    metrics: Metrics
    progress: Progress
    limits: Limits
    control: Control
    schedulers: Schedulers
    validation: ValidationTimes
    take_up: Callable[[], None]
    reload_data: Callable[[], None]
    prepare_epoch: Callable[[], None]
    validate: Callable[[], None]
    save_where_due: Callable[[], None]
    suspend: Callable[[], None]
    log_every_n_steps: int
    automatic: bool
    saves: bool
    inside_window: bool = False
    asked_saves: list[tuple[str, bool]] = field(default_factory=list)
    batch_idx: int = 0
    num_batches: int | float = 0
    last_batch: tuple[Any, Any, int] | None = None
    stepper: Stepper = field(init=False)
    data: PlannedData | StreamedData = field(init=False)
    training_step: Callable[..., Any] = field(init=False)
    ghost_step: Callable[..., Any] = field(init=False)


def fit(fit: Fit) -> None:
    """Train until `max_epochs`, `max_steps` or `max_time` is reached, or all ranks agreed to stop.

    A run that was cut after its last step does what was left: validation, the end of the epoch, `on_train_end`.
    """
    over = is_over(fit)
    if fit.data.num_batches == 0 or (over and fit.progress.total_batches == 0):
        return
    for hook in fit.hooks.on_train_start:
        hook()
    fit.take_up()
    go_on = not over or fit.progress.cut_in_epoch
    while go_on:
        if not train_epoch(fit):
            rank_zero_warn("Training ends: an epoch had no batch. The loader is empty, or can be iterated only once.")
            break
        go_on = not is_over(fit)
    fit.metrics.deliver(wait=True)
    for hook in fit.hooks.on_train_end:
        hook()


def is_over(fit: Fit) -> bool:
    """Whether a limit is reached, or all ranks agree to stop."""
    return fit.control.stop_agreed_now() or fit.limits.reached(fit.progress)


def train_epoch(fit: Fit) -> bool:
    """One pass over the data, from wherever in it the run stands; validation happens inside it. False: no data."""
    progress, metrics = fit.progress, fit.metrics
    train = train_window if fit.automatic else train_by_hand
    resumed = progress.batches_in_epoch > 0
    window = None
    fit.reload_data()
    if not resumed:
        for hook in fit.hooks.on_train_epoch_start:
            hook()
    fit.prepare_epoch()  # after the hooks, which may thaw parameters or set the accumulation
    if resumed:
        settle(fit)
        if is_over(fit):
            finish_epoch(fit, whole=progress.batches_in_epoch >= fit.num_batches)
            return True
    for window in fit.data.windows(progress.epoch, progress.batches_in_epoch):
        fit.inside_window = True
        if not train(fit, window):
            break
        fit.inside_window = False
        step, last = progress.global_step, progress.batches_in_epoch >= fit.num_batches
        if metrics.waiting:
            metrics.deliver()
        if step % fit.log_every_n_steps == 0 or step == 1:
            metrics.boundary(step, progress.epoch, progress.samples)
        stop = fit.control.stop_agreed()
        if last:
            progress.due.append("epoch")
        if fit.validation.due(progress, last, stop):
            progress.due.append("validation")
        if fit.schedulers.monitored_by_step:
            progress.due.append("step_monitored")
        if fit.saves or fit.asked_saves:
            fit.save_where_due()
        if fit.control.suspending:
            fit.suspend()
        if progress.due:
            validates = "validation" in progress.due
            settle(fit)
            stop = stop or (validates and fit.control.stop_agreed_now())
        if stop or step == fit.limits.max_steps:
            finish_epoch(fit, whole=last)
            return True
    else:
        if fit.validation.due_at_the_end(progress):
            progress.due += ["epoch", "validation"]
            settle(fit)
    fit.inside_window = False
    finish_epoch(fit, whole=True)
    return window is not None or resumed


def settle(fit: Fit) -> None:
    """Do what is due after a window, in its order; a resumed run does what its checkpoint had left to do.

    Each task leaves the list when it is done: validation before `on_validation_end`, where checkpoints are saved.
    """
    progress = fit.progress
    if progress.due == ["stopped"]:  # in the middle of an epoch, with which a run of higher limits goes on
        progress.due = []
    while progress.due:
        if progress.due[0] == "validation":
            progress.validated_at = progress.total_batches
            fit.validate()
        else:
            fit.schedulers.run(progress.due[0], progress)
            progress.due.pop(0)


def finish_epoch(fit: Fit, whole: bool) -> None:
    """The end of an epoch, or (not `whole`) of training in the middle of one: what was logged is reduced."""
    progress = fit.progress
    if whole:
        fit.schedulers.run("epoch", progress)
    for hook in fit.hooks.on_train_epoch_end:
        hook()
    fit.metrics.finish_epoch(progress.global_step, progress.epoch, progress.samples, keep=not whole)
    if whole:
        fit.schedulers.run("epoch_monitored", progress)
    progress.due = ["next_epoch" if whole else "stopped"]
    for hook in fit.hooks.on_train_epoch_end_acting:
        hook()
    if whole:
        progress.end_epoch()


def train_window(fit: Fit, window: Window) -> bool:
    """Forward and backward for every micro-batch, then one optimizer step; False: skip the rest of the epoch."""
    hooks, metrics, progress, strategy, stepper = fit.hooks, fit.metrics, fit.progress, fit.strategy, fit.stepper
    last = len(window.scales) - 1
    last_real = last - window.ghosts
    metrics.window += 1
    stepper.begin(window)
    for index, scale, weight, batch in zip(
        range(last + 1), window.scales, window.weights, window.batches, strict=False
    ):
        batch_idx = fit.batch_idx = progress.batches_in_epoch
        metrics.batch, metrics.weight = batch, weight
        for hook in hooks.on_train_batch_start:
            if hook(batch, batch_idx) == -1:
                strategy.drop_window()
                return False
        if last:
            strategy.sync_gradients(index == last)

        metrics.hook = "training_step"
        output = (fit.training_step if index <= last_real else fit.ghost_step)(batch, batch_idx)
        loss = output if isinstance(output, Tensor) else loss_of(output)
        if loss is None:
            stepper.skip_backward(index, batch_idx)
        else:
            if loss.grad_fn is None or loss.ndim:
                check_loss(loss)
            if not stepper.cleared:
                stepper.zero_grad(batch_idx)
            # Asking a device tensor whether it is 1 would be a host sync.
            scaled = strategy.scale(loss if type(scale) is float and scale == 1.0 else loss * scale)
            if stepper.keeps:
                stepper.keep(batch, batch_idx, scale, scaled)
            for hook in hooks.on_before_backward:
                hook(scaled)
            if stepper.own_backward is None:
                scaled.backward()
            else:
                stepper.own_backward(scaled)
            for hook in hooks.on_after_backward:
                hook()

        progress.batches_in_epoch += 1
        if index == last:
            stepped = stepper.step(batch_idx)
            progress.windows_in_epoch += 1
            progress.samples += window.samples
            if stepped:
                progress.global_step += 1
                if fit.schedulers.by_step:
                    fit.schedulers.run("step", progress)
        if hooks.on_train_batch_end or fit.saves:
            outputs = outputs_of(output)
            fit.last_batch = outputs, batch, batch_idx
            for hook in hooks.on_train_batch_end:
                hook(outputs, batch, batch_idx)
    return True


def train_by_hand(fit: Fit, window: Window) -> bool:
    """One batch of manual optimization: `training_step` goes backward and steps by itself."""
    hooks, metrics, progress = fit.hooks, fit.metrics, fit.progress
    batch = next(window.batches)
    batch_idx = fit.batch_idx = progress.batches_in_epoch
    metrics.window += 1
    metrics.batch, metrics.weight = batch, window.weights[0]
    for hook in hooks.on_train_batch_start:
        if hook(batch, batch_idx) == -1:
            return False

    metrics.hook = "training_step"
    output = fit.training_step(batch, batch_idx)

    progress.batches_in_epoch += 1
    progress.windows_in_epoch += 1
    progress.samples += window.samples
    if fit.stepper.stepped_by_hand():
        progress.global_step += 1
    if hooks.on_train_batch_end or fit.saves:
        outputs = outputs_of(output)
        fit.last_batch = outputs, batch, batch_idx
        for hook in hooks.on_train_batch_end:
            hook(outputs, batch, batch_idx)
    return True


def loss_of(output: Any) -> Tensor | None:
    """The loss in what `training_step` returned, unless it is a tensor itself; ConfigurationError where none is."""
    if output is None:
        return None
    if isinstance(output, dict) and isinstance(loss := output.get("loss"), Tensor):
        return loss
    held = f"a dict with keys {sorted(map(str, output))}" if isinstance(output, dict) else f"{output!r:.80}"
    raise ConfigurationError(
        f"training_step returned {held} ({type(output).__name__}). Return the loss as a scalar tensor, a dict whose "
        "'loss' is one, or None to skip the batch."
    )


def check_loss(loss: Tensor) -> None:
    """Refuse a loss that no backward pass can start from; ConfigurationError."""
    if loss.numel() != 1:
        raise ConfigurationError(
            f"training_step returned a loss of shape {tuple(loss.shape)}. Return one number: loss.mean() or loss.sum()."
        )
    if loss.grad_fn is None and not loss.requires_grad:
        raise ConfigurationError(
            "training_step returned a loss that has no gradient (requires_grad is False). Compute it from the module's "
            "parameters, without detach(), .item() or no_grad(), and check that not all parameters are frozen."
        )


def outputs_of(output: Any) -> dict[str, Any]:
    """What `on_train_batch_end` gets: the step's dict, its loss detached and not scaled."""
    if isinstance(output, Tensor):
        return {"loss": output.detach()}
    if isinstance(output, dict):
        return {key: item.detach() if isinstance(item, Tensor) else item for key, item in output.items()}
    return {}
