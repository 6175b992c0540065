"""Values for a module that was built on the meta device and sharded: those that one process would have given it.

Every rank repeats in host memory what `configure_model` did, as a `Recording` tells it: a tensor is there from the
first operation that it needs to the last, and then each rank keeps its shards, so no rank ever holds the whole model.
Surprising: a value that is overwritten later is not kept until then, but drawn all the same, since what follows comes
from the same random stream.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import ConfigurationError
from .recording import Operation, Recording, View
from .sharding import local, sharded_like


def views_of(module: nn.Module, recording: Recording) -> dict[str, View]:
    """What each parameter and buffer on the meta device stands for, by name; before anything replaces them."""
    return {name: recording.view(tensor) for name, tensor in _tensors(module).items() if tensor.is_meta}


def attributes_of(module: nn.Module, recording: Recording) -> list[tuple[nn.Module, str, Any]]:
    """(part, name, value) of the other attributes that hold tensors of the meta device, as metrics do, with what these
    stand for in their place; what needs gradients follows from parameters, and is left to the module."""

    def noted(item: Any) -> Any:
        if isinstance(item, torch.device):
            return torch.device("cpu") if item.type == "meta" else item
        is_value = item.is_meta and not item.requires_grad and not isinstance(item, nn.Parameter)
        return recording.view(item) if is_value else item

    found = []
    for part in module.modules():
        for name, value in vars(part).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                tree = tree_map_only((Tensor, torch.device), noted, value)
                if any(old is not new for old, new in zip(tree_leaves(value), tree_leaves(tree), strict=True)):
                    found.append((part, name, tree))
    return found


@torch.no_grad()
def initialise(
    module: nn.Module,
    device: torch.device,
    recording: Recording,
    views: Mapping[str, View],
    attributes: list[tuple[nn.Module, str, Any]],
    filled_later: Container[str] = (),
) -> None:
    """Give the sharded `module` its values, on `device`; all but those of the names in `filled_later`. `attributes`
    stay in host memory.

    The generators of all ranks must be in one state, and are in one afterwards.
    Raises ConfigurationError for a parameter or buffer that nothing initialises, by name.
    """
    _allocate(module, device)
    tensors = _tensors(module)
    names: dict[int, list[str]] = {}
    for name, view in views.items():
        if name not in filled_later:
            names.setdefault(view.memory, []).append(name)
    spare = any(name in filled_later for name in views)
    lost = {name for held in names.values() for name in held}

    others = {leaf for _, _, tree in attributes for leaf in tree_leaves(tree) if isinstance(leaf, View)}
    values: dict[View, Tensor] = {}

    def keep(memory: int, storage: torch.UntypedStorage, blank: bool) -> None:
        values.update({view: view.of(storage).clone() for view in others if view.memory == memory})
        for name in names.get(memory, ()):
            value = views[name].of(storage)
            if not (blank and _has_marks(value)):
                lost.discard(name)
            _keep(tensors[name], value)

    repeat(recording, names.keys() | {view.memory for view in others}, spare, keep)
    for part, name, tree in attributes:
        if all(leaf in values for leaf in tree_leaves(tree) if isinstance(leaf, View)):
            setattr(part, name, tree_map_only(View, values.__getitem__, tree))
    if lost:
        first = min(lost)
        owner = type(module.get_submodule(first.rpartition(".")[0])).__name__.removeprefix("FSDP")
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise ConfigurationError(
            f"{first!r}{more} was built on the meta device and nothing initialises it. Give it values where {owner} "
            "makes it, in configure_model; or build the model in __init__, which costs every rank the memory of the "
            "whole model."
        )


def repeat(
    recording: Recording, wanted: set[int], spare: bool, keep: Callable[[int, torch.UntypedStorage, bool], None]
) -> None:
    """Call `keep` with each wanted memory when it has its last value, and whether it was made without any. Nothing is
    drawn if `spare` and nothing that is wanted is random: what is, depends on all that was drawn before."""
    needed = _needed(recording.operations, wanted)
    held: dict[int, torch.UntypedStorage] = {}
    blank = set[int]()
    drawn = not spare or any(operation.draws_from for operation in recording.operations if id(operation) in needed)
    states = {0: recording.start}  # of the generators, where they are put back to

    def put(generator: torch.Generator, state: Tensor | int | None) -> None:
        if state is not None:
            generator.set_state(states[state] if isinstance(state, int) else state)

    torch.set_rng_state(recording.start)
    for place, operation in enumerate(recording.operations, 1):
        if operation.draws_from is not None:
            put(operation.draws_from, operation.state)
        if id(operation) in needed:
            _run(operation, held, recording.sizes)
            if operation.makes_blank:
                blank |= operation.written
        elif operation.draws_from is not None and drawn:
            _run(operation, {}, recording.sizes)
        if operation.draws_from is not None and place in recording.returns:
            states[place] = operation.draws_from.get_state()
        for memory in needed.get(id(operation), ()):
            if memory in wanted:
                keep(memory, held[memory], memory in blank)
            del held[memory]
    for generator, state in recording.ends:
        put(generator, state)


def _needed(operations: list[Operation], wanted: set[int]) -> dict[int, set[int]]:
    """The operations, by their id, on which the values of `wanted` depend, with the memories that no later one of them
    touches."""
    found: dict[int, set[int]] = {}
    alive, touched = set(wanted), set[int]()
    for operation in reversed(operations):
        if operation.written & alive:
            alive -= operation.overwritten | {view.memory for view in operation.made.values()}
            alive |= operation.read
            own = operation.read | operation.written
            found[id(operation)] = own - touched
            touched |= own
    return found


def _run(operation: Operation, held: dict[int, torch.UntypedStorage], sizes: Mapping[int, int]) -> None:
    """Do the operation on the memories in `held`, where new ones are put."""

    def real(view: View) -> Tensor:
        if view.memory not in held:
            held[view.memory] = torch.zeros(sizes[view.memory], dtype=torch.uint8).untyped_storage()
        return view.of(held[view.memory])

    made = {i: real(view) for i, view in operation.made.items()}
    if operation.makes_blank:
        for tensor in made.values():
            if tensor.is_floating_point() or tensor.is_complex():  # whole numbers bear no mark and count as set
                tensor.fill_(float("nan"))
        return
    args, kwargs = tree_map_only(View, real, (operation.args, operation.kwargs))
    results = [item for item in tree_leaves(operation.function(*args, **kwargs)) if isinstance(item, Tensor)]
    for i, tensor in made.items():
        tensor.copy_(results[i])


def _allocate(module: nn.Module, device: torch.device) -> None:
    """Memory for what is on the meta device; what was tied stays so."""
    new: dict[int, Tensor] = {}
    for part in module.modules():
        for group in (part._parameters, part._buffers):
            for name, tensor in group.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in new:
                    data = torch.empty_like(tensor, device=device, requires_grad=False)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    new[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if is_parameter else data
                held: dict[str, Any] = group
                held[name] = new[id(tensor)]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, by each of their names."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _has_marks(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and bool(tensor.isnan().any())


def _keep(tensor: Tensor, full: Tensor) -> None:
    """Give `tensor` its share of `full`."""
    local(tensor).copy_(local(sharded_like(tensor, full)) if hasattr(tensor, "placements") else full)
