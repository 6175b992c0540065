"""`Stepper`: from a window's gradients to one optimizer step, through every hook that a user may override.

Clear as the window begins, or before its first backward where a hook may look; at its end unscale, clip, step. A user's
own `optimizer_step` and optimizers that need a closure (LBFGS) get one that can repeat the window, whose batches are
kept for them alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigurationError
from .optimizer_handle import OptimizerHandle
from .windows import Window

if TYPE_CHECKING:
    from .loop import Fit
    from .module import Module


class Stepper:
    """The optimizer's half of a window. `cleared`: gradients of the window before are gone."""

    def __init__(
        self,
        fit: Fit,
        module: Module,
        optimizers: list[Optimizer],
        clip_value: float | None,
        clip_algorithm: str | None,
    ) -> None:
        hooks = fit.hooks
        self.cleared = False
        self.own_backward = hooks.own(module, "backward")
        self._module = module
        self._fit = fit
        self._strategy = fit.strategy
        self._hooks = hooks
        self._metrics = fit.metrics
        self._optimizer = optimizers[0]
        self.handles = [OptimizerHandle(optimizer, self.step_by_hand, module) for optimizer in optimizers]
        self._clip = (clip_value, clip_algorithm)
        self._own_zero_grad = hooks.own(module, "optimizer_zero_grad")
        # Where no hook can tell, the forward pass need not share the memory with the gradients of the window before.
        self._clears_early = self._own_zero_grad is None and not hooks.on_before_zero_grad
        self._own_clipping = hooks.own(module, "configure_gradient_clipping")
        self._own_step = hooks.own(module, "optimizer_step")
        self._needs_closure = needs_closure(self._optimizer)
        self.keeps = self._own_step is not None or self._needs_closure
        self._kept: list[tuple[Any, int, Any]] = []
        self._loss: Tensor | None = None
        self._window: Window
        self._skipped: list[int] = []
        self._steps_by_hand = 0

    def begin(self, window: Window) -> None:
        """A new window: nothing of it is done."""
        self._window = window
        self.cleared = False
        if self._skipped:
            self._skipped = []
        if self.keeps:
            self._kept, self._loss = [], None
        if self._clears_early:
            clear_gradients(self._optimizer)

    def let_go(self) -> None:
        """Hold no window any more: with it goes the loader's iterator, and its workers."""
        self._window = Window(iter(()), (), (), 0)
        self._kept, self._loss = [], None

    def zero_grad(self, batch_idx: int) -> None:
        """Clear the gradients of the window before."""
        self.cleared = True
        if self._clears_early:
            return
        optimizer = self._optimizer
        for hook in self._hooks.on_before_zero_grad:
            hook(optimizer)
        if self._own_zero_grad is None:
            clear_gradients(optimizer)
        else:
            self._own_zero_grad(self._fit.progress.epoch, batch_idx, optimizer)

    def skip_backward(self, index: int, batch_idx: int) -> None:
        """`training_step` returned None: alone, its weight leaves the window; beside others, its gradient is zero."""
        if self._strategy.sharded:
            raise ConfigurationError(
                f"training_step returned None under {self._strategy.name}, where every rank must go backward. Return "
                "`loss * 0`, or filter in the data set."
            )
        if self._strategy.world_size == 1:
            self._skipped.append(index)
            return
        if not self.cleared:
            self.zero_grad(batch_idx)
        self._strategy.idle_backward()

    def keep(self, batch: Any, batch_idx: int, scale: Any, scaled: Tensor) -> None:
        """Remember a micro-batch for a closure that repeats the window."""
        self._kept.append((batch, batch_idx, scale))
        self._loss = scaled.detach() if self._loss is None else self._loss + scaled.detach()

    def step(self, batch_idx: int) -> bool:
        """The window's optimizer step; False where none was taken."""
        optimizer = self._optimizer
        if not self.cleared:
            return False
        if self._skipped:
            self._share_out_skipped()
        self._strategy.unscale_gradients(optimizer)
        for hook in self._hooks.on_before_optimizer_step:
            hook(optimizer)
        if self._own_clipping is not None:
            self._own_clipping(optimizer, *self._clip)
        elif self._clip[0] is not None:
            self.clip_gradients(optimizer, self._clip[0], self._clip[1] or "norm")
        if self._own_step is not None:
            handle = self.handles[0]
            before = handle.stepped
            self._own_step(self._fit.progress.epoch, batch_idx, handle, self._closure())
            return handle.stepped > before
        return self._strategy.optimizer_step(optimizer, self._closure() if self._needs_closure else None)

    def clip_gradients(self, optimizer: Optimizer, value: float, algorithm: str) -> None:
        """Clip as the strategy does, and log the norm that it computed."""
        norm = self._strategy.clip_gradients(parameters_of(optimizer), value, algorithm)
        if norm is not None:
            before, self._metrics.hook = self._metrics.hook, "configure_gradient_clipping"
            self._metrics.log("grad_norm", norm, batch_size=1)
            self._metrics.hook = before

    def _share_out_skipped(self) -> None:
        """Losses were scaled by shares of the whole window; without the skipped batches the shares are larger."""
        scales = self._window.scales
        left = sum(scale for index, scale in enumerate(scales) if index not in self._skipped)
        gradients = [p.grad for p in self._module.parameters() if p.grad is not None]
        if left:  # else what was not skipped weighs nothing
            torch._foreach_div_(gradients, float(left))

    def _closure(self) -> Callable[[], Tensor | None]:
        calls = 0

        def closure() -> Tensor | None:
            nonlocal calls
            calls += 1
            if calls > 1:
                self._repeat()
            if self._loss is None:
                return None
            # Over all ranks: its shares are scaled as gradients are reduced.
            return self._strategy.all_reduce(self._loss.clone()) / self._strategy.gradient_divisor

        return closure

    def _repeat(self) -> None:
        """Forward and backward of the kept window once more, without batch hooks; what it logs is logged already."""
        with torch.enable_grad(), self._metrics.silent():
            self._optimizer.zero_grad()
            self._loss = None
            last = len(self._kept) - 1
            for index, (batch, batch_idx, scale) in enumerate(self._kept):
                if last:
                    self._strategy.sync_gradients(index == last)
                output = self._fit.training_step(batch, batch_idx)
                loss = output if isinstance(output, Tensor) else output["loss"]
                scaled = self._strategy.scale(loss * scale)
                scaled.backward()
                self._loss = scaled.detach() if self._loss is None else self._loss + scaled.detach()
        self._strategy.unscale_gradients(self._optimizer)

    # --- manual optimization ------------------------------------------------------------------------------------
    def backward_by_hand(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """A backward pass whose gradients are averaged over the ranks; repeating that is harmless."""
        if self._fit.automatic:
            raise ConfigurationError(
                "manual_backward() is for manual optimization. Set self.automatic_optimization = False in __init__, or "
                "return the loss from training_step."
            )
        strategy = self._strategy
        averaged = loss if strategy.gradient_divisor == strategy.data_ranks else loss / strategy.data_ranks
        scaled = strategy.scale(averaged)
        for hook in self._hooks.on_before_backward:
            hook(scaled)
        if self.own_backward is None:
            scaled.backward(*args, **kwargs)
        else:
            self.own_backward(scaled, *args, **kwargs)
        self._strategy.average_gradients(self._module.parameters())
        for hook in self._hooks.on_after_backward:
            hook()

    def step_by_hand(self, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> bool:
        """What `step` of the wrapper does that `self.optimizers()` returns."""
        if not self._fit.automatic:
            self._strategy.unscale_gradients(optimizer)
            for hook in self._hooks.on_before_optimizer_step:
                hook(optimizer)
        return self._strategy.optimizer_step(optimizer, closure, **kwargs)

    def stepped_by_hand(self) -> bool:
        """Whether any optimizer stepped since this was last asked."""
        before, self._steps_by_hand = self._steps_by_hand, sum(handle.stepped for handle in self.handles)
        return self._steps_by_hand > before


def needs_closure(optimizer: Optimizer) -> bool:
    """True for optimizers whose `step` cannot do without one, as LBFGS."""
    step = inspect.unwrap(type(optimizer).step)
    closure = inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def clear_gradients(optimizer: Optimizer) -> None:
    """`optimizer.zero_grad()`; torch's own without its profiler range, which costs more than all the rest of it."""
    if getattr(optimizer.zero_grad, "__func__", None) is not Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]
