"""Public names that load on first use (PEP 562): what the `__init__` files of the package share.

A package says where its names live by ordinary imports under `if TYPE_CHECKING:`, which type checkers and completion
read. So does `lazy_names`: the block never runs, and a module is imported when one of its names is first touched, so
`import paceline` costs next to nothing and works where torch is missing.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def lazy_names(module_name: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and the `__dir__` of the module `module_name`.

    `from . import name` names a submodule, which is reached as an attribute without having been imported.
    """
    module = sys.modules[module_name]

    def __getattr__(name: str) -> Any:
        places, submodules = _imports_for_type_checkers(module)
        if name in submodules:
            return import_module(f"{module_name}.{name}")
        if name not in places:
            raise _unknown_name(module_name, name, [*places, *submodules])
        place, name_there = places[name]
        value = getattr(import_module(place, module.__package__), name_there)
        setattr(module, name, value)  # the next access does not come here
        return value

    def __dir__() -> list[str]:
        places, submodules = _imports_for_type_checkers(module)
        return sorted({*places, *submodules, *(name for name in vars(module) if name.startswith("__"))})

    return __getattr__, __dir__


@cache
def _imports_for_type_checkers(module: Any) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Public name → (module, name there), and the submodules."""
    import ast  # here, so that importing the package alone imports nothing

    places, submodules = {}, []
    (block,) = (node for node in ast.parse(module.__loader__.get_source(module.__name__)).body if type(node) is ast.If)
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        for alias in statement.names:
            if statement.module is None:
                submodules.append(alias.name)
            else:
                place = "." * statement.level + statement.module
                places[alias.asname or alias.name] = (place, alias.name)
    return places, submodules


def _unknown_name(module_name: str, name: str, known: list[str]) -> AttributeError:
    message = f"module '{module_name}' has no attribute '{name}'"
    if not name.startswith("_"):  # tools probe modules for private names: no search for those
        from .errors import did_you_mean

        message += f". {did_you_mean(name, sorted(known), 'It has')}"
    # Without a context of our own the interpreter adds its own "Did you mean" to the printed traceback.
    return AttributeError(message, name=name, obj=None)
