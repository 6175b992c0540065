"""`Trainer(compile=...)`: forwards are compiled in place, before the strategy wraps anything.

In place means `nn.Module.compile`: parameters, checkpoints and hooks keep their names, and `self.layer(x)` in a step
runs compiled code. `training_step` itself is not compiled: it may log, branch and read the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..errors import ConfigurationError


def compile_module(
    module: nn.Module, how: bool | str | dict[str, Any] | None, find_blocks: Callable[[nn.Module], list[nn.Module]]
) -> None:
    """Compile what `how` says: True, or a dict of `torch.compile`'s options, the forward of `module` and of each child;
    "blocks" its repeated layers (`find_blocks`), which share their compiled code. What is compiled already stays.
    """
    if not how:
        return
    parts = find_blocks(module) if how == "blocks" else list(_parts(module))
    if not parts:
        lacks = "layers that repeat. Use compile=True." if how == "blocks" else "forward, nor a layer with parameters."
        raise ConfigurationError(f"compile={how!r}, but {type(module).__name__} has no {lacks}")
    options = how if isinstance(how, dict) else {}
    for part in parts:
        if part._compiled_call_impl is None:
            part.compile(**options)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The module, if it has a forward of its own, and its children; a list's members in its place."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is not nn.Module.forward:
        yield module
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _parts(child)
        elif any(True for _ in child.parameters()):
            yield child
