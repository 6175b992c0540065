"""Which parts of a model are sharded, gathered and checkpointed as one: its repeated layers, or those that are named.

A rank holds one gathered block at a time, so blocks should be many and alike: the layers of a transformer, the stages
of a convolutional network. `find_blocks` looks for the layers that a container repeats; `named_blocks` finds those of a
class or a name. Nothing here communicates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn

from ..errors import ConfigurationError, did_you_mean

#: A repeated layer with more than this share of all parameters is looked into for smaller repeated ones.
_LARGE = 0.25


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers that `model` repeats, outermost first choice; empty where none repeats.

    Layers with layers of their own (a transformer's block) are preferred to bare ones (a Linear). Like parts of a
    ModuleDict are left out: what is looked up by name (experts, adapters, heads of tasks) may differ between ranks,
    which would then gather each other's parameters.
    """
    total = sum(p.numel() for p in model.parameters()) or 1
    return list(_repeated(model, total, bare=False)) or list(_repeated(model, total, bare=True))


def named_blocks(model: nn.Module, wanted: Sequence[type[nn.Module] | str]) -> list[nn.Module]:
    """The modules of the classes, class names or paths in `wanted`; of a container that is named, its layers.

    Raises ConfigurationError for one that is not there.
    """
    found: list[nn.Module] = []
    for item in wanted:
        if not isinstance(item, (str, type)):
            raise ConfigurationError(
                f"blocks holds {item!r}. Name layers by class, class name or path: blocks=[{type(item).__name__}]."
            )
        parts = [m for path, m in model.named_modules() if m is not model and _is_named(path, m, item)]
        if not parts:
            name = item if isinstance(item, str) else item.__name__
            classes = sorted({type(m).__name__ for m in model.modules() if m is not model})
            advice = did_you_mean(name, classes, "It has")
            raise ConfigurationError(f"blocks names {name!r}, but {type(model).__name__} has no such layer. {advice}")
        for part in parts:
            found += part.children() if isinstance(part, (nn.ModuleList, nn.ModuleDict)) else [part]
    return [m for m in model.modules() if any(m is part for part in found) and any(True for _ in m.parameters())]


def without_shared(model: nn.Module, blocks: list[nn.Module]) -> tuple[list[nn.Module], list[str]]:
    """Blocks that share no parameter with a part outside them, and the paths of those that do: these cannot be
    gathered alone, since both users of the parameter must see it gathered."""
    names = {m: path for path, m in model.named_modules()}
    times = Counter(part for _, part in model.named_modules(remove_duplicate=False))
    users = _users(model)
    kept: list[nn.Module] = []
    left: list[nn.Module] = []
    for block in blocks:
        own = _users(block)
        (kept if all(users[key] == count * times[block] for key, count in own.items()) else left).append(block)
    return kept, [names[block] for block in left]


def described(model: nn.Module, blocks: Sequence[nn.Module]) -> str:
    """ "12 x Block (h.0 ... h.11)": what was found, for the one line that is printed."""
    names = {m: path for path, m in model.named_modules()}
    kinds: dict[str, list[str]] = {}
    for block in blocks:
        kinds.setdefault(type(block).__name__.removeprefix("FSDP"), []).append(names[block])
    return ", ".join(
        f"{len(paths)} x {kind} ({paths[0]}{f' ... {paths[-1]}' if len(paths) > 1 else ''})"
        for kind, paths in kinds.items()
    )


def _users(model: nn.Module) -> Counter[int]:
    """How often each parameter, by its id, is some part's own; a part in several places counts in each."""
    parts = (part for _, part in model.named_modules(remove_duplicate=False))
    return Counter(id(p) for part in parts for p in part._parameters.values() if p is not None)


def _is_named(path: str, module: nn.Module, item: type[nn.Module] | str) -> bool:
    if isinstance(item, str):
        return item in (path, *(kind.__name__ for kind in type(module).__mro__))
    return isinstance(module, item)


def _repeated(model: nn.Module, total: int, bare: bool) -> Iterator[nn.Module]:
    children = [child for child in dict.fromkeys(model.children()) if any(True for _ in child.parameters())]
    counts = Counter(type(child) for child in children)
    if isinstance(model, nn.ModuleDict):
        children = [child for child in children if counts[type(child)] == 1]
    for child in children:
        own = any(True for _ in child.children()) and not isinstance(child, (nn.ModuleList, nn.ModuleDict))
        if counts[type(child)] > 1 and (own or (bare and not isinstance(child, (nn.ModuleList, nn.ModuleDict)))):
            size = sum(p.numel() for p in child.parameters())
            inner = list(_repeated(child, total, bare=False)) if size > _LARGE * total else []
            yield from inner or [child]
        else:
            yield from _repeated(child, total, bare)
