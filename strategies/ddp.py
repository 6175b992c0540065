"""`DDP`: every rank holds the whole model; gradients are averaged once a window by torch's DistributedDataParallel.

DistributedDataParallel wraps a thin module that is handed the step to run, so the user's `forward` stays as it is.
Surprising: its first backward reduces in another bucket layout than all later ones, which would make a resumed run
differ by bits; so every `wrap` runs two backwards of zero first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigurationError
from .base import Strategy, register_strategy, zero_loss
from .precision import Precision
from .steps import Steps


@register_strategy("ddp")
class DDP(Strategy):
    """Data parallel over processes; takes torch's own options of DistributedDataParallel.

    `sync_batchnorm` replaces BatchNorm layers by ones whose statistics are those of all ranks.
    """

    distributed = True

    def __init__(self, *, sync_batchnorm: bool = False, **ddp_options: Any) -> None:
        super().__init__()
        self.sync_batchnorm = sync_batchnorm
        self._options = {"gradient_as_bucket_view": True, **ddp_options}
        self._wrapped: DistributedDataParallel | None = None
        self._trainable: list[bool] = []

    def place(self, module: nn.Module, precision: Precision) -> None:
        """As the base class does, and with BatchNorm layers over all ranks if `sync_batchnorm` asks for them."""
        if self.sync_batchnorm and self.world_size > 1:
            if self.device.type == "cpu":
                raise ConfigurationError(
                    "sync_batchnorm=True: torch has no SyncBatchNorm on the CPU. Leave it out there."
                )
            nn.SyncBatchNorm.convert_sync_batchnorm(module)
        super().place(module, precision)

    def wrap(self) -> None:
        """Wrap the module in DistributedDataParallel, which copies rank 0's weights to all; needed again only when
        other parameters are trainable than before."""
        assert self.module is not None
        if self.world_size == 1:
            return
        trainable = [p.requires_grad for p in self.module.parameters()]
        if self._wrapped is not None and trainable == self._trainable:
            return
        self._trainable, self._wrapped = trainable, None
        if not any(trainable):
            for tensor in (*self.module.parameters(), *self.module.buffers()):
                dist.broadcast(tensor.detach(), 0)
            return
        self._wrapped = DistributedDataParallel(Steps(self.module), **self._options)
        for _ in range(2):
            self._wrapped(zero_loss, self.module).backward()
        for parameter in self.module.parameters():
            parameter.grad = None

    def unwrap(self) -> None:
        """Let go of DistributedDataParallel and its gradient buckets."""
        self._wrapped = None

    def training_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step` inside DistributedDataParallel's forward."""
        step = self._in_precision(step)
        return step if self._wrapped is None else partial(self._wrapped, step)

    def sync_gradients(self, enabled: bool) -> None:
        """What DistributedDataParallel's `no_sync` sets, without a context manager a micro-batch."""
        if self._wrapped is not None:
            self._wrapped.require_backward_grad_sync = enabled

    def idle_backward(self) -> None:
        """As the base class does. A search for unused parameters found all to be, as the step returned no loss."""
        loss, wrapped = zero_loss(self.module), self._wrapped
        if wrapped is not None and wrapped.find_unused_parameters and wrapped.require_backward_grad_sync:
            wrapped.reducer.prepare_for_backward([loss])
        loss.backward()

    def sync_buffers(self) -> None:
        """Rank 0's, as before each forward in training: ranks' batch statistics differ since the last one."""
        if self._wrapped is not None and self._wrapped.broadcast_buffers:
            for buffer in self._wrapped.module.buffers():
                dist.broadcast(buffer, 0)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average `.grad` over the ranks in one flat all-reduce; an absent one counts as zero."""
        if self.world_size == 1:
            return
        held = [p for p in parameters if p.requires_grad]
        for parameter in held:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [p.grad for p in held if p.grad is not None]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= self.world_size
        torch._foreach_copy_(
            grads,
            [part.view_as(grad) for part, grad in zip(flat.split([g.numel() for g in grads]), grads, strict=True)],
        )


register_strategy("ddp_find_unused_parameters_true", find_unused_parameters=True)(DDP)
