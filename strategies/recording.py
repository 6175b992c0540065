"""`Recording`: what `configure_model` does to tensors on the meta device, noted so that it can be done again.

Tensors without memory still have an identity: views of one parameter, and the parameter itself, share a storage. So
each operation is noted with the memories that it reads and writes; `initialise.py` repeats those that matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import ConfigurationError

_OVERWRITE = {"normal_", "uniform_", "zero_", "fill_", "copy_", "_no_grad_trunc_normal_"}
#: What operations write although their schema does not say so.
_WRITTEN = {"native_batch_norm": ("running_mean", "running_var")}


@dataclass(frozen=True)
class View:
    """A tensor on the meta device, as a view of the memory that it stands for."""

    memory: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        """The same view of real memory."""
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)


@dataclass
class Operation:
    """One call of torch, with a `View` for each tensor; `made` are those of new memory, by their place in the results.

    `overwritten`: memory of which nothing is left; `draws_from`: the generator, if it is random; `state`: to which that
    was set before this call, as the number of operations after which it was in it, or as it is.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: dict[int, View]
    read: set[int]
    changed: set[int]
    overwritten: set[int]
    draws_from: torch.Generator | None
    state: Tensor | int | None

    @property
    def makes_blank(self) -> bool:
        """Whether it makes memory without values."""
        return bool(self.made) and _name(self.function).removeprefix("new_").startswith("empty")

    @property
    def written(self) -> set[int]:
        """The memories that it makes or changes."""
        return self.changed | {view.memory for view in self.made.values()}


class Recording(TorchDispatchMode):
    """Notes the operations on tensors of the meta device while it is entered.

    Nothing draws there, so each random operation moves its generator on to a state of its own: that shows where code
    puts one back, as `fork_rng` does, or seeds it again. `returns`: the places, in operations done, that it is put to.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.start = torch.get_rng_state()
        self.ends: list[tuple[torch.Generator, Tensor | int | None]] = []
        self.returns = {0}
        self._states = {torch.default_generator: self.start}
        self._places = {_key(self.start): 0}
        self.sizes: dict[int, int] = {}
        self._held: list[torch.UntypedStorage] = []  # no two may have one address

    def view(self, tensor: Tensor) -> View:
        """What a tensor on the meta device stands for."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self._held.append(storage)
        # `shape` of a lazy layer's parameter raises, and `size()` does not.
        return View(storage._cdata, tensor.size(), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = [
            args[i] if i < len(args) else kwargs.get(argument.name)
            for i, argument in enumerate(func._schema.arguments)
            if (argument.alias_info is not None and argument.alias_info.is_write)
            or argument.name in _WRITTEN.get(_name(func), ())
        ]
        given, changed = (
            [item for item in tree_leaves(tree) if isinstance(item, Tensor)] for tree in ((args, kwargs), written)
        )
        on_meta = torch.device(kwargs.get("device") or "cpu").type == "meta" or any(map(_is_meta, given))
        if not (on_meta and all(map(_is_meta, changed))):
            if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
                raise ConfigurationError(
                    f"configure_model draws random numbers ({_name(func)}) for a tensor that was made on the CPU or by "
                    "torch.tensor, before those of the layers, which are drawn when they are sharded. Make it by "
                    "torch.empty without a device, draw with a generator of its own, or draw in __init__."
                )
            return func(*args, **kwargs)
        out = func(*tree_map_only(Tensor, _to_meta, args), **tree_map_only(Tensor, _to_meta, kwargs))
        self.note(func, args, kwargs, changed, [item for item in tree_leaves(out) if isinstance(item, Tensor)])
        return out

    def note(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], changed: list[Tensor], results: list[Tensor]
    ) -> None:
        """Note a call that changed tensors in place and returned `results`."""
        read = [self.view(t).memory for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and _is_meta(t)]
        made = {i: view for i, view in enumerate(map(self.view, results)) if view.memory not in read}
        if not made and not changed:
            return
        overwritten = set[int]()
        if _name(function) in _OVERWRITE and changed[0].nbytes == self.sizes[read[0]] and read.count(read[0]) == 1:
            overwritten = {read.pop(0)}
        args, kwargs = tree_map_only(Tensor, self._noted, (args, kwargs))
        if "device" in kwargs:  # the default type may be another one when this is repeated
            kwargs |= {"device": torch.device("cpu"), "dtype": results[0].dtype}
        written = {self.view(t).memory for t in changed}
        operation = Operation(function, args, kwargs, made, set(read), written, overwritten, None, None)
        self.operations.append(operation)
        if torch.Tag.nondeterministic_seeded in getattr(function, "tags", (torch.Tag.nondeterministic_seeded,)):
            own = (item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Generator))
            generator = operation.draws_from = next(own, torch.default_generator)
            operation.state = self._set_to(generator)
            self._states[generator] = self._new_state(generator)

    def finish(self) -> None:
        """Note in `ends` to which state each generator was set after all operations."""
        self.ends = [(generator, self._set_to(generator)) for generator in self._states]

    def _noted(self, tensor: Tensor) -> View | Tensor:
        return self.view(tensor) if _is_meta(tensor) else tensor.detach().clone()

    def _new_state(self, generator: torch.Generator) -> Tensor:
        """Move `generator` on to a state in which no generator was, which is noted as that of this place."""
        steps = 1
        while _key(state := generator.get_state()) in self._places or steps == 1:
            torch.rand(steps, generator=generator, device=generator.device)
            steps *= 2
        self._places[_key(state)] = len(self.operations)
        return state

    def _set_to(self, generator: torch.Generator) -> Tensor | int | None:
        """The generator's state, or the place where it was in it, if it was set after its last operation."""
        state = generator.get_state()
        if generator in self._states and torch.equal(state, self._states[generator]):
            return None
        place = self._places.get(_key(state))
        if place is None:
            return state
        self.returns.add(place)
        return place


class AsIfReal(TorchFunctionMode):
    """Where all else is on the meta device, numbers of Python and NumPy become real tensors, since nobody could tell
    them afterwards; and tensors deny to be without memory, so that `nn.init` does not skip them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.is_meta.__get__:  # type: ignore[attr-defined]
            return False
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance((*args, None)[0], Tensor):
            kwargs = {"device": "cpu"} | kwargs
        return func(*args, **kwargs)


@contextmanager
def recorded(recording: Recording) -> Iterator[None]:
    """The context in which what is built is on the meta device and noted."""
    draw = nn.init._no_grad_trunc_normal_

    def truncated(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # it draws until all values are within bounds
        if not _is_meta(tensor):
            return draw(tensor, *args, **kwargs)
        recording.note(draw, (tensor, *args), kwargs, [tensor], [])
        return tensor

    nn.init._no_grad_trunc_normal_ = truncated
    try:
        with torch.device("meta"), AsIfReal(), recording:
            yield
        recording.finish()
    finally:
        nn.init._no_grad_trunc_normal_ = draw


def _name(function: Any) -> str:
    schema = getattr(function, "_schema", None)
    return str(schema.name.partition("::")[2] if schema else function.__name__)


def _key(state: Tensor) -> int:
    return hash(state.numpy().tobytes())


def _is_meta(tensor: Tensor) -> bool:
    return tensor.device.type == "meta"


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")
