"""`CombinedLoader`: several loaders as one, in the four ways that Lightning 2.x names.

A loader is anything that can be iterated. Lists, tuples and dicts around loaders are structure, and come back as the
structure of each batch. Below the class, each way is one generator function.

One surprising fact: a limit says how many of a loader's batches count towards the combined length. It ends the loader
itself only in "sequential"; in the other modes the loader goes on beside one that is longer, as under Lightning's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from itertools import count, islice
from math import inf
from typing import Any, Literal, TypeAlias, get_args

from torch.utils import _pytree as pytree

from ..errors import ConfigurationError, did_you_mean
from .loaders import length_of

Mode: TypeAlias = Literal["min_size", "max_size_cycle", "max_size", "sequential"]
_Batches: TypeAlias = Generator[tuple[Any, int, int], None, None]
_Limits: TypeAlias = Sequence[int | float]

_MODES: tuple[str, ...] = get_args(Mode)
_ENDED = object()


class CombinedLoader:
    """Iterate over a collection of loaders together, as `(batch, batch_idx, dataloader_idx)`.

    | mode | ends | a batch is |
    |---|---|---|
    | `"min_size"` | with the shortest loader | the collection, with one batch of each loader in its place |
    | `"max_size_cycle"` | with the longest | the same; shorter loaders start again |
    | `"max_size"` | with the longest | the same, with `None` for loaders that have ended |
    | `"sequential"` | after the last | a batch of one loader; `batch_idx` counts within that loader |

    `flattened` are the loaders in their order; a loader's place in it is its `dataloader_idx`.
    Each `iter(combined)` starts anew, and calls `iter()` on the loaders when its first batch is asked for.
    """

    def __init__(self, iterables: Any, mode: Mode = "min_size") -> None:
        if mode not in _MODES:
            raise ConfigurationError(f"CombinedLoader has no mode={mode!r}. {did_you_mean(str(mode), _MODES)}")
        self.iterables = iterables
        self.mode: Mode = mode
        found, self._structure = pytree.tree_flatten_with_path(iterables)
        self._paths = [f"iterables{pytree.keystr(path)}" for path, _ in found]
        self.flattened = [loader for _, loader in found]
        self._limits: list[int | float] | None = None
        self._newest: _Batches | None = None
        for path, loader in zip(self._paths, self.flattened, strict=True):
            if isinstance(loader, dict) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
                raise ConfigurationError(
                    f"CombinedLoader cannot iterate over {path}, which is {loader!r:.80}. Its places hold loaders: "
                    "anything that `iter()` accepts but lists, tuples and dicts, which are the structure around them."
                )

    @property
    def limits(self) -> list[int | float] | None:
        """How many batches of each loader count; set with one number a loader, one for all, or `None` for no limit."""
        return None if self._limits is None else list(self._limits)

    @limits.setter
    def limits(self, limits: float | _Limits | None) -> None:
        if isinstance(limits, int | float):
            limits = [limits] * len(self.flattened)
        if limits is not None and len(limits) != len(self.flattened):
            raise ConfigurationError(
                f"limits={list(limits)} are {len(limits)} for {len(self.flattened)} loaders. "
                "Give one number a loader, or a single number for all."
            )
        self._limits = None if limits is None else list(limits)

    def map(self, function: Callable[[Any], Any]) -> CombinedLoader:
        """A new `CombinedLoader` of `function(loader)` for each loader, with the same structure, mode and limits."""
        mapped = CombinedLoader(self._structure.unflatten(map(function, self.flattened)), self.mode)
        mapped.limits = self._limits
        return mapped

    def __len__(self) -> int:
        """The number of batches; raises `TypeError` where it depends on a loader that has no length."""
        known = [inf if length is None else length for length in map(length_of, self.flattened)]
        lengths = list(map(min, known, self._bounds()))
        total = _COMBINED_LENGTH[self.mode](lengths) if lengths else 0
        if total == inf:
            unknown = [path for path, length in zip(self._paths, lengths, strict=True) if length == inf]
            raise TypeError(
                f"CombinedLoader(mode={self.mode!r}) has no length, because {' and '.join(unknown)} has none. "
                "Give the loader a __len__, or limit the number of batches."
            )
        return int(total)

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        # The generator must not refer to this object: a cycle would keep workers alive until garbage is collected.
        self._newest = _batches(self._structure, self.flattened, self.mode, self._bounds())
        return self._newest

    def __next__(self) -> tuple[Any, int, int]:
        if self._newest is None:
            raise RuntimeError(
                "next(combined_loader) goes on with the newest iteration; call iter(combined_loader) first."
            )
        return next(self._newest)

    def reset(self) -> None:
        """End the newest iteration and let go of its iterators, with their workers."""
        if self._newest is not None:
            self._newest.close()
        self._newest = None

    def _bounds(self) -> _Limits:
        return [inf] * len(self.flattened) if self._limits is None else self._limits


def _batches(structure: pytree.TreeSpec, loaders: list[Any], mode: Mode, limits: _Limits) -> _Batches:
    if mode == "sequential":
        yield from _sequential(loaders, limits)
    elif loaders:
        for batch_idx, row in enumerate(_ROWS[mode](loaders, limits)):
            yield structure.unflatten(row), batch_idx, 0


def _sequential(loaders: list[Any], limits: _Limits) -> _Batches:
    for dataloader_idx, (loader, limit) in enumerate(zip(loaders, limits, strict=True)):
        if limit > 0:
            for batch_idx, batch in enumerate(islice(loader, _stop(limit))):
                yield batch, batch_idx, dataloader_idx


def _min_size(loaders: list[Any], limits: _Limits) -> Iterator[Sequence[Any]]:
    return islice(zip(*loaders, strict=False), _stop(min(limits)))


def _max_size(loaders: list[Any], limits: _Limits, cycle: bool) -> Iterator[Sequence[Any]]:
    iterators = [iter(loader) for loader in loaders]
    in_first_pass = [True] * len(loaders)
    for row in count():
        if row >= max(limits):
            return
        batches = [next(iterator, _ENDED) for iterator in iterators]
        in_first_pass = [first and batch is not _ENDED for first, batch in zip(in_first_pass, batches, strict=True)]
        if not any(first and row < limit for first, limit in zip(in_first_pass, limits, strict=True)):
            return
        for number, batch in enumerate(batches):
            if batch is _ENDED:
                if cycle:
                    iterators[number] = iter(loaders[number])
                batches[number] = _first_batch(iterators[number], loaders[number]) if cycle else None
        yield batches


def _first_batch(iterator: Iterator[Any], loader: Any) -> Any:
    batch = next(iterator, _ENDED)
    if batch is _ENDED:
        raise ConfigurationError(
            f'mode="max_size_cycle" starts shorter loaders again, but {loader!r:.80} then gives no batch: it is empty, '
            "or can be iterated only once. Give it batches, or an `__iter__` that starts anew, or choose another mode."
        )
    return batch


_ROWS: dict[str, Callable[[list[Any], _Limits], Iterator[Sequence[Any]]]] = {
    "min_size": _min_size,
    "max_size_cycle": partial(_max_size, cycle=True),
    "max_size": partial(_max_size, cycle=False),
}
_COMBINED_LENGTH: dict[str, Callable[[list[int | float]], int | float]] = {
    "min_size": min,
    "max_size_cycle": max,
    "max_size": max,
    "sequential": sum,
}


def _stop(limit: float) -> int | None:
    return None if limit == inf else int(limit)
