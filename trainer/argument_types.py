"""`checked_types`: a constructor whose arguments are of the types that it names, before it does anything."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, ParamSpec

from ..errors import WrongTypeError

P = ParamSpec("P")

#: What is accepted for an annotation, and its name in an error. Numbers of NumPy and torch are numbers.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda v: type(v).__name__ in ("bool", "bool_") or (type(v) is int and v in (0, 1)), "True or False"),
    "int": (lambda v: hasattr(v, "__index__") and type(v) is not bool, "a whole number"),
    "float": (lambda v: hasattr(v, "__float__"), "a number"),
    "str": (lambda v: isinstance(v, str), "a text"),
    "str | os.PathLike[str]": (lambda v: isinstance(v, (str, os.PathLike)), "a path"),
    "timedelta": (lambda v: isinstance(v, timedelta), "a timedelta"),
}


def checked_types(init: Callable[P, None]) -> Callable[P, None]:
    """`__init__` that raises a WrongTypeError for an argument which is not of its one simple type, or None."""
    kinds = kinds_of(init)
    names = list(inspect.signature(init).parameters)

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        check_types(type(args[0]).__name__, kinds, {**dict(zip(names, args, strict=False)), **kwargs})
        init(*args, **kwargs)

    return checked


def kinds_of(init: Callable[..., None]) -> dict[str, tuple[str, bool]]:
    """Of the parameters with one simple type: its name, and whether None is accepted."""
    found = {}
    for name, parameter in inspect.signature(init).parameters.items():
        kind = str(parameter.annotation)
        if kind.removesuffix(" | None") in _KINDS:
            found[name] = kind.removesuffix(" | None"), kind.endswith(" | None")
    return found


def check_types(owner: str, kinds: Mapping[str, tuple[str, bool]], given: Mapping[str, Any]) -> None:
    """WrongTypeError for the first given argument of another type."""
    for name, (kind, optional) in kinds.items():
        accepts, told = _KINDS[kind]
        if name in given and not (given[name] is None and optional) and not accepts(given[name]):
            raise WrongTypeError(
                f"{owner}({name}={given[name]!r}): expected {told}{' or None' if optional else ''}, "
                f"got {type(given[name]).__name__}."
            )
