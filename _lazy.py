"""Public names that load on first use (PEP 562): what the `__init__` files of the package share.

A package says where each of its names lives; the module is imported when the name is first touched, so
`import paceline` costs next to nothing and works where torch is missing. Type checkers and completion do not run
this: they read the ordinary imports that stand beside each table under `if TYPE_CHECKING:`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping


def lazy_names(
    module_name: str, names: Mapping[str, str], submodules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and the `__dir__` of the module `module_name`.

    `names` maps a public name to its place, written as in a relative import: `".trainer.loop"`, or
    `".trainer.module:Module"` where it has another name there. `submodules` are reached as attributes without
    having been imported.
    """
    module = sys.modules[module_name]

    def __getattr__(name: str) -> Any:
        if name in submodules:
            return import_module(f"{module_name}.{name}")
        if name not in names:
            raise _unknown_name(module_name, name, [*names, *submodules])
        place, _, name_there = names[name].partition(":")
        value = getattr(import_module(place, module.__package__), name_there or name)
        setattr(module, name, value)  # the next access does not come here
        return value

    def __dir__() -> list[str]:
        return sorted({*names, *submodules, *(name for name in vars(module) if name.startswith("__"))})

    return __getattr__, __dir__


def _unknown_name(module_name: str, name: str, known: list[str]) -> AttributeError:
    message = f"module '{module_name}' has no attribute '{name}'"
    if not name.startswith("_"):  # tools probe modules for private names: no search for those
        from .errors import did_you_mean

        message += f". {did_you_mean(name, sorted(known), 'It has')}"
    # Without a context of our own the interpreter adds its own "Did you mean" to the printed traceback.
    return AttributeError(message, name=name, obj=None)
