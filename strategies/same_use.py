"""Whether all ranks train the same parameters: where one leaves some out, FSDP mixes up what the ranks send each other.

A block that a rank does not run is not gathered there, and a parameter without a gradient is left out of its group's
reduction, so the others' tensors arrive in the wrong places, in silence if their sizes agree. Which parameters had
gradients is summed up after each window and compared after 1, 2, 4, 8, ... of them: no rank waits for another in most.
Hooks on gradients, which run on no rank, are looked for at the same times.
"""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigurationError
from .base import Strategy
from .whole_use import refuse_hooks


class SameUse:
    """What this rank used so far, as one number."""

    def __init__(self) -> None:
        self._windows = 0
        self._sum = 0

    def check(self, optimizer: Optimizer, module: nn.Module, strategy: Strategy) -> None:
        """Note the window whose gradients are there; ConfigurationError on every rank if they used other parameters."""
        held = (p for group in optimizer.param_groups for p in group["params"])
        self._windows += 1
        self._sum = hash((self._sum, *(p.grad is None for p in held)))
        if self._windows & (self._windows - 1):
            return
        refuse_hooks(module, strategy.name, ours=1)
        channel = strategy.channel("same use")  # of the hosts: no rank waits for its device
        if len(set(channel.gather_objects(self._sum))) == 1:
            return
        without = {path for path, p in module.named_parameters() if p.requires_grad and p.grad is None}
        ranks = list(map(set, channel.gather_objects(without)))
        other = sorted(set.union(*ranks) - set.intersection(*ranks))
        named = f" ({', '.join(map(repr, other[:3]))}{', ...' if len(other) > 3 else ''})" if other else ""
        raise ConfigurationError(
            f"Some ranks trained parameters{named} that others left out of their loss. {strategy.name} gathers and "
            "reduces them in one order on all ranks, so they were mixed up. Keep such layers out of the blocks "
            f"(blocks=[...] names those that every rank runs) and use {strategy.name}(find_unused_parameters=True)."
        )
