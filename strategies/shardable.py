"""Which modules can be sharded, and as which groups; what is refused before anything of them is changed."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from torch import nn

from ..errors import ConfigurationError
from .base import Strategy
from .whole_use import refuse_hooks

if TYPE_CHECKING:
    from .sharding import Sharding


def refuse_other(options: Sharding, before: Sharding) -> None:
    """ConfigurationError where a module that is sharded already should have been sharded otherwise."""
    for field in fields(options):
        was, now = (getattr(each, field.name) for each in (before, options))
        if was != now:
            was, now = (getattr(each, "name", each) for each in (was, now))  # of a precision
            raise ConfigurationError(
                f"The module was sharded with {field.name}={was!r}, now it is {now!r}. Use {was!r}, or a new module "
                "and the weights of a checkpoint."
            )


def check_module(module: nn.Module, strategy: Strategy) -> None:
    """ConfigurationError for a module of which the ranks cannot all have a share."""
    count = sum(p.numel() for p in module.parameters())
    if not count:
        raise ConfigurationError(
            f"{type(module).__name__} has no parameters, so {strategy.name} has nothing to shard. Build its layers in "
            "__init__ or configure_model, or use strategy='ddp'."
        )
    scalars = [name for name, p in module.named_parameters() if p.dim() == 0]
    if scalars:
        raise ConfigurationError(
            f"{scalars[0]!r} has no dimension, so {strategy.name} cannot shard it. Make it a parameter of shape (1,)."
        )
    empty = [name for name, p in module.named_parameters() if p.dim() and not p.numel()]
    if empty:
        raise ConfigurationError(
            f"{empty[0]!r} has no elements, so {strategy.name} cannot shard it. Leave it out, or make it a buffer."
        )
    lost = [name for name, p in module.named_parameters() if getattr(p, "_post_accumulate_grad_hooks", None)]
    if lost:
        raise ConfigurationError(
            f"{lost[0]!r} has a hook (register_post_accumulate_grad_hook), which is lost as {strategy.name} puts a "
            "shard in its place. Register it in on_fit_start."
        )
    refuse_hooks(module, strategy.name)
    if count < strategy.world_size:
        raise ConfigurationError(
            f"{type(module).__name__} has {count} parameter(s), fewer than the {strategy.world_size} ranks, so "
            f"{strategy.name} cannot give each a share. Use strategy='ddp'."
        )


def children_with_parameters(module: nn.Module) -> list[nn.Module]:
    """The groups of manual optimization: each child, or each child of a list of them; ConfigurationError."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        raise ConfigurationError(
            f"{type(module).__name__} has parameters of its own ({', '.join(own)}), which no child's forward gathers: "
            "with manual optimization (automatic_optimization = False) every child is sharded for itself. Put them "
            "into a child with a forward, or use strategy='ddp'."
        )
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += children_with_parameters(child)
        elif any(True for _ in child.parameters()):
            found.append(child)
    return found
