"""`Steps`: a thin module whose forward runs whichever step it is given.

Wrappers such as DistributedDataParallel and `fully_shard` act around a module's forward; put around this one, they act
around `training_step` and leave the user's `forward` and class as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Steps(nn.Module):
    """`Steps(module)(module.training_step, batch, 0)` is `module.training_step(batch, 0)` inside its own forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, step: Callable[..., Any], *args: Any) -> Any:
        """What `step(*args)` returns."""
        return step(*args)
