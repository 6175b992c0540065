"""Values for a module that was built on the meta device and sharded: those that one process would have drawn.

Every rank draws all numbers of one common stream, one layer at a time, keeps its shards and frees the rest, so no rank
ever holds more than one layer whole. The order is that of construction: children first, then their parent's own
parameters by `reset_parameters()`; a module with `init_weights(module)` then applies it to all its parts, as
`self.apply(self.init_weights)` does at the end of a constructor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import ConfigurationError


def initialise(module: nn.Module, device: torch.device, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give the sharded `module` its values, on `device`; `dtypes` are those in which its tensors were built.

    The generators of all ranks must be in one state, and are in one afterwards.
    Raises ConfigurationError for a parameter or buffer that nothing initialises, by name.
    """
    missing = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_meta]
    waiting = {id(tensor) for tensor in missing}
    names = {m: path for path, m in module.named_modules()}
    lost: list[str] = []
    for part in _children_first(module):
        own = {name: tensor for name, tensor in _tensors(part).items() if id(tensor) in waiting}
        if not own:
            continue
        waiting -= {id(tensor) for tensor in own.values()}
        prefix = f"{names[part]}." if names[part] else ""
        full = {
            name: _unset(tensor, dtypes.get(prefix + name, tensor.dtype)) for name, tensor in own.items()
        }
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        _run(part, full, reset)
        for name, tensor in own.items():
            _fill(part, name, tensor, full[name], device)
        lost += [prefix + name for name in own if _is_unset(full[name])]
    still = _apply_init_weights(module, set(lost), device)
    if still:
        owner = module.get_submodule(still[0].rpartition(".")[0])
        raise ConfigurationError(
            f"{still[0]!r} was built on the meta device and nothing initialises it. Define reset_parameters() in "
            f"{type(owner).__name__.removeprefix('FSDP')}, or init_weights(module) in the model, that fills it "
            f"(all such: {', '.join(still[:10])}); or build the model in __init__, which costs every rank its memory."
        )


def _apply_init_weights(module: nn.Module, lost: set[str], device: torch.device) -> list[str]:
    """What every `init_weights(module)` does to the parts below it; returns the names that are still not set."""
    names = {m: path for path, m in module.named_modules()}
    for owner in _children_first(module):
        init = getattr(owner, "init_weights", None)
        if not callable(init):
            continue
        for part in _children_first(owner):
            own = _tensors(part)
            full = {name: _gathered(tensor) for name, tensor in own.items()}
            prefix = f"{names[part]}." if names[part] else ""
            for name in own:
                if prefix + name in lost:
                    _mark_unset(full[name])
            if full:
                _run(part, full, lambda part=part, init=init: init(part))
            for name, tensor in own.items():
                _fill(part, name, tensor, full[name], device)
                if prefix + name in lost and not _is_unset(full[name]):
                    lost.discard(prefix + name)
    return sorted(lost)


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
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


def _unset(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A whole host tensor in the place of `tensor`, marked as without value."""
    full = torch.empty(tensor.shape, dtype=dtype, device="cpu")
    _mark_unset(full)
    return full


def _mark_unset(full: Tensor) -> None:
    if full.is_floating_point() or full.is_complex():
        full.detach().fill_(float("nan"))
    else:
        full.detach().zero_()


def _is_unset(full: Tensor) -> bool:
    """Whether nothing, or not everything, was written; whole numbers have no such mark and count as set."""
    return bool(full.isnan().any()) if full.is_floating_point() or full.is_complex() else False


def _gathered(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def _run(part: nn.Module, full: dict[str, Tensor], initialiser: Callable[[], Any] | None) -> None:
    """Call `initialiser` while `part` has the whole tensors; `full` has what it has afterwards."""
    if initialiser is None:
        return
    groups = {name: part._parameters if name in part._parameters else part._buffers for name in full}
    held = {name: group[name] for name, group in groups.items()}
    for name, group in groups.items():
        requires_grad = isinstance(held[name], nn.Parameter) and full[name].is_floating_point()
        group[name] = nn.Parameter(full[name], requires_grad) if isinstance(held[name], nn.Parameter) else full[name]
    try:
        with torch.no_grad():
            initialiser()
        for name, group in groups.items():
            changed = group[name]
            assert changed is not None
            full[name] = changed.detach()
    finally:
        for name, group in groups.items():
            group[name] = held[name]


@torch.no_grad()
def _fill(part: nn.Module, name: str, tensor: Tensor, full: Tensor, device: torch.device) -> None:
    """Keep this rank's share of `full` as the data of `tensor`, whose identity stays where it can."""
    if isinstance(tensor, DTensor):
        full = full.to(tensor.device_mesh.device_type, tensor.dtype)
        mine = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        tensor.to_local().copy_(mine)
    elif tensor.is_meta:
        group: Any = part._parameters if name in part._parameters else part._buffers
        data = full.to(device, tensor.dtype)
        group[name] = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
    else:
        tensor.copy_(full)
