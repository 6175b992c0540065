"""Which layers train and which parameters need gradients: what hooks change of it while a run trains is saved with it.

What the model's own code sets before training it sets again in a resumed run; the rest is `changed_since`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def switches(module: nn.Module) -> dict[str, bool]:
    """`training` of every layer and `requires_grad` of every parameter, by path; inside an evaluation, as before it."""
    before = dict(vars(module).get("_modes", ()))
    modes = {f"{name}.training": before.get(layer, layer.training) for name, layer in module.named_modules()}
    return modes | {f"{name}.requires_grad": p.requires_grad for name, p in module.named_parameters()}


def changed_since(start: Mapping[str, bool], module: nn.Module) -> dict[str, bool]:
    """The switches that are now other than at `start`."""
    return {path: on for path, on in switches(module).items() if start.get(path) != on}


def put_switches(module: nn.Module, changed: Mapping[str, bool]) -> None:
    """Set what `changed_since` found; what the module no longer has is passed over."""
    parts = {f"{name}.training": part for name, part in module.named_modules()}
    parts |= {f"{name}.requires_grad": part for name, part in module.named_parameters()}
    for path in changed.keys() & parts.keys():
        setattr(parts[path], path.rpartition(".")[2], changed[path])
