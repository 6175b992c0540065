"""Values for a module that was built on the meta device and sharded: those that one process would have drawn.

Every rank draws all numbers of one common stream, one layer at a time, keeps its shards and frees the rest, so no rank
ever holds more than one layer whole. The order is that of construction: children first, then their parent's own
parameters by `reset_parameters()`. A module with `init_weights(module)` then applies it to all its parts, as
`self.apply(self.init_weights)` does at the end of a constructor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from .sharding import local, sharded_like, whole

_Initialiser = Callable[[], Any]


def initialise(
    module: nn.Module, device: torch.device, dtypes: Mapping[str, torch.dtype], filled_later: Container[str] = ()
) -> None:
    """Give the sharded `module` its values, on `device`; `dtypes` are those in which its tensors were built.

    Parts whose tensors are all `filled_later` are left without, which spares drawing a large model only to load it.

    The generators of all ranks must be in one state, and are in one afterwards.
    Raises ConfigurationError for a parameter or buffer that nothing initialises, by name.
    """
    prefixes = {part: f"{path}." if path else "" for path, part in module.named_modules()}
    built = _allocate(module, device)
    lost: set[str] = set()
    done: set[int] = set()
    for part, own in built.items():
        if all(prefixes[part] + name in filled_later for name in own):
            continue
        full = {name: _unset(own[name], dtypes.get(prefixes[part] + name)) for name in own}
        _run(part, full, getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None))
        for name, tensor in own.items():
            if id(tensor) in done:
                continue  # tied to one that has its values; drawing for it kept the stream in step
            done.add(id(tensor))
            _keep(tensor, full[name])
            if _is_unset(full[name]):
                lost.add(prefixes[part] + name)
    _apply_init_weights(module, prefixes, lost, filled_later)
    if lost:
        first = min(lost)
        owner = type(module.get_submodule(first.rpartition(".")[0])).__name__.removeprefix("FSDP")
        others = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise ConfigurationError(
            f"{first!r}{others} was built on the meta device and nothing initialises it. Define reset_parameters() in "
            f"{owner}, or init_weights(module) in the model, that fills it; or build the model in __init__, which "
            "costs every rank the memory of the whole model."
        )


def _allocate(module: nn.Module, device: torch.device) -> dict[nn.Module, dict[str, Tensor]]:
    """Memory for what is on the meta device, children first: the tensors of each part that still lack values."""
    new: dict[int, Tensor] = {}
    built: dict[nn.Module, dict[str, Tensor]] = {}
    for part in _children_first(module):
        for name, tensor in _tensors(part).items():
            if not tensor.is_meta:
                continue
            if id(tensor) not in new:
                data = torch.empty_like(tensor, device=device, requires_grad=False)
                is_parameter = isinstance(tensor, nn.Parameter)
                new[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if is_parameter else data
            _group(part, name)[name] = new[id(tensor)]
            built.setdefault(part, {})[name] = new[id(tensor)]
    return built


def _apply_init_weights(
    module: nn.Module, prefixes: Mapping[nn.Module, str], lost: set[str], filled_later: Container[str]
) -> None:
    """What every `init_weights(module)` does to the parts below it; names that it sets leave `lost`."""
    for owner in _children_first(module):
        init = _init_weights_of(owner)
        if init is None:
            continue
        for part in _children_first(owner):
            own = _tensors(part)
            if all(prefixes[part] + name in filled_later for name in own):
                continue
            full = {name: _gathered(tensor) for name, tensor in own.items()}
            waiting = {name for name in own if prefixes[part] + name in lost}
            for name in waiting:
                _mark_unset(full[name])
            _run(part, full, partial(init, part))
            for name, tensor in own.items():
                _keep(tensor, full[name])
            lost -= {prefixes[part] + name for name in waiting if not _is_unset(full[name])}


def _init_weights_of(owner: nn.Module) -> Callable[[nn.Module], Any] | None:
    for name in ("init_weights", "_init_weights"):
        init = getattr(owner, name, None)
        if callable(init) and len(inspect.signature(init).parameters) == 1:
            return init  # type: ignore[no-any-return]
    return None


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    """Every part once, in the order in which `Module.apply` visits them."""
    seen: set[nn.Module] = set()

    def walk(part: nn.Module) -> Iterator[nn.Module]:
        if part not in seen:
            seen.add(part)
            for child in part.children():
                yield from walk(child)
            yield part

    return walk(module)


def _tensors(part: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that belong to `part` itself."""
    return {name: t for group in (part._parameters, part._buffers) for name, t in group.items() if t is not None}


def _group(part: nn.Module, name: str) -> dict[str, Any]:
    return part._parameters if name in part._parameters else part._buffers


def _unset(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A whole host tensor in the place of `tensor`, marked as without value."""
    full = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="cpu")
    _mark_unset(full)
    return full


def _mark_unset(full: Tensor) -> None:
    full.fill_(float("nan") if full.is_floating_point() or full.is_complex() else 0)


def _is_unset(full: Tensor) -> bool:
    """Whether nothing, or not everything, was written; whole numbers bear no such mark and count as set."""
    return (full.is_floating_point() or full.is_complex()) and bool(full.isnan().any())


def _gathered(tensor: Tensor) -> Tensor:
    return whole(tensor).detach().cpu().clone()


def _run(part: nn.Module, full: dict[str, Tensor], initialiser: _Initialiser | None) -> None:
    """Call `initialiser` while `part` has the whole tensors; `full` holds what they are afterwards."""
    if initialiser is None:
        return
    held = {name: _group(part, name)[name] for name in full}
    for name, tensor in held.items():
        is_parameter = isinstance(tensor, nn.Parameter)
        _group(part, name)[name] = nn.Parameter(full[name], False) if is_parameter else full[name]
    try:
        with torch.no_grad():
            initialiser()
        full.update({name: _group(part, name)[name].detach() for name in full})
    finally:
        for name, tensor in held.items():
            _group(part, name)[name] = tensor


@torch.no_grad()
def _keep(tensor: Tensor, full: Tensor) -> None:
    """Give `tensor` its share of `full`."""
    local(tensor).copy_(local(sharded_like(tensor, full)) if hasattr(tensor, "placements") else full)
