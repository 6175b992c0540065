"""Hyper-parameters: the arguments a module or data module was made with, kept, saved, and used to make it again.

`HyperParameters` is the mixin; its `save_hyperparameters` looks up the stack for the running `__init__`s of `self`,
so that a child's arguments are found when only the parent saves. Below it: what of them a checkpoint can hold
(`hparams_for_checkpoint`), and the way back to arguments (`filter_init_arguments`).
The surprise: no class is ever named in a checkpoint. A dataclass is stored as a dict of its fields, and becomes that
dataclass again because the annotation of the `__init__` argument says so.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import inspect
import sys
import typing
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import PurePath
from types import FrameType, SimpleNamespace, UnionType
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigurationError, UnknownArgumentError, did_you_mean
from .checkpoint.encode import encode
from .rank_zero import rank_zero_warn

ALL_ARGUMENTS = "kwargs"  # the `hparams_name` of hyper-parameters that are `__init__`'s arguments themselves


class AttributeDict(dict[str, Any]):
    """A dict whose items are attributes too: `hparams.lr` is `hparams["lr"]`. Printed, it is a table."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        known = ", ".join(map(str, self)) or "nothing"
        raise AttributeError(f"'AttributeDict' object has no attribute {name!r}; it holds {known}.")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise AttributeError(f"'AttributeDict' object has no attribute {name!r}.")
        del self[name]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *map(str, self)]

    def __repr__(self) -> str:
        width = max((len(str(name)) for name in self), default=0) + 3
        return "\n".join(f'"{name}":'.ljust(width) + f" {self[name]}" for name in sorted(self, key=str))


if TYPE_CHECKING:
    on_class_only = classmethod  # type checkers know the first argument of no other decorator's method
else:

    class on_class_only(classmethod):
        """A class method that refuses to be called on an object, where its result would be taken for a change of it."""

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            method = super().__get__(instance, owner)
            return method if instance is None else _refusing(method, type(instance))


def _refusing(method: Callable[..., Any], cls: type) -> Callable[..., Any]:
    @functools.wraps(method)
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{method.__name__}() makes a new object and leaves the one that it is called on as it is. Write "
            f"module = {cls.__name__}.{method.__name__}(...)."
        )

    return refuse


class HyperParameters:
    """Gives `save_hyperparameters`, `hparams` and `hparams_initial` to modules and data modules."""

    _log_hyperparams: bool = False  # loggers write the hyper-parameters that were saved with logger=True
    # For `filter_init_arguments`, to be stored beside hparams: the argument whose items they are, and those of them
    # that are themselves arguments of the class.
    _hparams_name: str | None = ALL_ARGUMENTS
    _hparams_init_names: Collection[str] = ()

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep the arguments of `__init__` in `self.hparams`; call it in `__init__`.

        Without `args` all of them, those of parents' and children's `__init__` included (the outermost call wins) and
        `**kwargs` one by one; with names only these; with a dict, Namespace or dataclass the values in it.
        `ignore` names what not to keep, `logger` says whether loggers write them, and `frame` is where to look for
        `__init__` from (the caller). Values are kept as they are at this moment, by reference.
        Raises UnknownArgumentError for a name that is no argument, ConfigurationError for what holds no names.
        """
        frame = sys._getframe(1) if frame is None else frame  # the caller's: our own would refer to itself
        calls = [_arguments_of(self, call) for call in _running_inits(self, frame)]
        given: dict[str, Any] = {}
        for arguments in calls:  # innermost first: what the class was really called with comes last and wins
            given.update(arguments)
        outermost = calls[-1] if calls else {}
        if not args and not calls:
            rank_zero_warn(
                f"save_hyperparameters() saved nothing: no __init__ of {type(self).__name__} is running. "
                "Call it in __init__, or pass a dict.",
                stacklevel=2,
            )
        names = [arg for arg in args if isinstance(arg, str)] if args else list(given)
        chosen: dict[str, Any] = {}
        for config in args:
            if config is not None and not isinstance(config, str) and (items := _items_of(config)):
                chosen.update(items)
                self._note_config(config, outermost)
        chosen.update({name: _argument(self, name, given) for name in names})
        if not args:
            self._hparams_name = ALL_ARGUMENTS
        direct = [name for name, value in chosen.items() if name in outermost and outermost[name] is value]
        self._hparams_init_names = [*dict.fromkeys([*self._hparams_init_names, *direct])]
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        self._keep({name: value for name, value in chosen.items() if name not in ignored}, ignored)
        self._log_hyperparams = logger

    @property
    def hparams(self) -> AttributeDict:
        """The saved hyper-parameters; may be changed, and is saved in checkpoints as it is then."""
        kept: AttributeDict = self.__dict__.setdefault("_hparams", AttributeDict())
        return kept

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of the hyper-parameters as they were when last saved, whatever was changed since."""
        initial: AttributeDict = _snapshot(self.__dict__.get("_hparams_initial", AttributeDict()))
        return initial

    def _note_config(self, config: Any, outermost: dict[str, Any]) -> None:
        """Remember which argument is `config`; of several such arguments none can be given its own items back."""
        name = next((name for name, value in outermost.items() if value is config), None)
        if name is not None:
            self._hparams_name = name if self._hparams_name in (ALL_ARGUMENTS, name) else None

    def _keep(self, chosen: dict[str, Any], ignored: set[str]) -> None:
        hparams = self.hparams
        modules = [name for name, value in chosen.items() if isinstance(value, nn.Module) and name not in hparams]
        if modules:
            rank_zero_warn(
                f"The hyper-parameters {modules} are nn.Modules: their weights are in every checkpoint anyway. "
                f"Leave them out with save_hyperparameters(ignore={modules}).",
                stacklevel=3,
            )
        for name in ignored:  # a parent may have saved it already
            hparams.pop(name, None)
        hparams.update(chosen)
        self.__dict__["_hparams_initial"] = _snapshot(hparams)

    def _hparams_to_store(self) -> dict[str, Any]:
        """What a checkpoint holds of `hparams`; warns, once, of those that it cannot hold."""
        storable, left_out = hparams_for_checkpoint(self.hparams)
        told: set[str] = self.__dict__.setdefault("_hparams_left_out", set())
        news = [name for name in left_out if name not in told]
        if news:
            told.update(news)
            rank_zero_warn(
                f"The hyper-parameters {news} cannot be stored and are left out of checkpoints; pass them to "
                f"{type(self).__name__}.load_from_checkpoint(), or leave them out with "
                f"save_hyperparameters(ignore={news})."
            )
        return storable


# --- collecting ------------------------------------------------------------------------------------------------------
def _running_inits(instance: object, frame: FrameType | None) -> list[FrameType]:
    """The frames in which an `__init__` of this very object runs, innermost first."""
    found = []
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__init__" and code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is instance:
            found.append(frame)
        frame = frame.f_back
    return found


def _arguments_of(instance: object, frame: FrameType) -> dict[str, Any]:
    """The arguments of a running `__init__` without `self` and `*args`, with `**kwargs` one by one."""
    names, _, keywords, values = inspect.getargvalues(frame)
    arguments = {name: values[name] for name in names[1:] if name in values}
    if keywords is not None and isinstance(values.get(keywords), Mapping):
        arguments.update(values[keywords])
    for kind in filter(dataclasses.is_dataclass, type(instance).__mro__):
        if getattr(vars(kind).get("__init__"), "__code__", None) is frame.f_code:
            for field in dataclasses.fields(kind):  # the generated __init__ holds a placeholder for a default_factory
                if field.name in arguments and field.default_factory is not dataclasses.MISSING:
                    arguments[field.name] = getattr(instance, field.name)
    return arguments


def _argument(owner: object, name: str, given: dict[str, Any]) -> Any:
    if name in given:
        return given[name]
    raise UnknownArgumentError(
        f"save_hyperparameters({name!r}): {name!r} is no argument of {type(owner).__name__}.__init__. "
        + did_you_mean(name, given, "The arguments are")
    )


def _items_of(config: Any) -> dict[str, Any]:
    """The names and values in a dict, a Namespace or a dataclass."""
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, (Namespace, SimpleNamespace)):
        return dict(vars(config))
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    raise ConfigurationError(
        f"save_hyperparameters() cannot take hyper-parameters from {config!r:.80} of type {type(config).__name__}. "
        'Pass names of arguments, as in save_hyperparameters("lr"), or a dict, a Namespace or a dataclass instance.'
    )


def _snapshot(value: Any) -> Any:
    """A copy that later changes do not reach; modules and other objects without a plain copy are shared."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps the type: AttributeDict, OrderedDict, defaultdict
        copied.update({name: _snapshot(item) for name, item in value.items()})
        return copied
    if type(value) in (list, tuple, set):
        return type(value)(map(_snapshot, value))
    if isinstance(value, (Namespace, SimpleNamespace)) or dataclasses.is_dataclass(value):
        if isinstance(value, type) or not hasattr(value, "__dict__"):
            return value
        twin = copy.copy(value)
        vars(twin).update({name: _snapshot(item) for name, item in vars(value).items()})  # frozen ones too
        return twin
    if type(value).__module__ == "numpy":
        return copy.copy(value)
    return value


# --- into a checkpoint -----------------------------------------------------------------------------------------------
def hparams_for_checkpoint(hparams: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`hparams` as a checkpoint can hold them, and the names of those that it cannot hold.

    Dataclasses and namespaces become dicts, enums their values, paths and devices text, sets sorted lists. A
    hyper-parameter is left out as a whole when anything in it cannot be stored.
    """
    storable: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in hparams.items():
        plain = _plain(value)
        try:
            encode({name: plain})
        except CheckpointError:
            left_out.append(str(name))
        else:
            storable[name] = plain
    return storable, left_out


def _plain(value: Any) -> Any:
    """`value` in plain types where it has an equal there; anything else as it is."""
    if isinstance(value, (nn.Module, type)):
        return value
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, (PurePath, torch.device)):
        return str(value)
    if isinstance(value, Tensor):
        return value.detach()
    if type(value).__module__ == "numpy":  # float64 is a float, but stays what it is
        return value
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, (Mapping, Namespace, SimpleNamespace)) or dataclasses.is_dataclass(value):
        return {_plain(name): _plain(item) for name, item in _items_of(value).items()}
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value), key=repr)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return [_plain(item) for item in value]
    return value


# --- out of a checkpoint ---------------------------------------------------------------------------------------------
def filter_init_arguments(
    cls: type,
    hparams: Mapping[str, Any] | None,
    overrides: Mapping[str, Any],
    hparams_name: str | None = None,
    init_names: Collection[str] | None = None,
) -> dict[str, Any]:
    """The keyword arguments with which to make a `cls` again from stored `hparams`; `overrides` win.

    Stored ones that `cls.__init__` does not take are dropped. `hparams_name` is the argument that held them all as
    one dict, Namespace or dataclass; overrides then change its items too. `init_names` are the arguments that the
    class itself was called with: where it takes `**kwargs`, only these are passed on, since it computes the others.
    Raises UnknownArgumentError for an override that is no argument, ConfigurationError for missing arguments.
    """
    init = _own_init(cls)
    parameters, takes_any = _parameters(init)
    hints = _annotations(init, parameters)
    stored = dict(hparams or {})

    def accepted(name: str | None) -> bool:
        return takes_any or name in parameters

    unknown = [name for name in overrides if not accepted(name)]
    arguments: dict[str, Any] = {}
    if hparams_name is None or hparams_name == ALL_ARGUMENTS or not accepted(hparams_name):
        direct = [name for name in stored if name in parameters or init_names is None or name in init_names]
    else:
        direct = [name for name in stored if name in (init_names or ())]
        config = {**stored, **{name: value for name, value in overrides.items() if name in stored or name in unknown}}
        arguments[hparams_name] = _rebuild(config, hints.get(hparams_name))
        if dataclasses.is_dataclass(arguments[hparams_name]):
            unknown = [name for name in unknown if not hasattr(arguments[hparams_name], name)]
        elif hparams_name not in overrides:
            unknown = []
    if unknown:
        raise UnknownArgumentError(
            f"load_from_checkpoint() got {unknown}, which {cls.__name__}.__init__ does not take. "
            + did_you_mean(unknown[0], parameters, "Its arguments are")
        )
    arguments.update({name: _rebuild(stored[name], hints.get(name)) for name in direct if accepted(name)})
    arguments.update({name: value for name, value in overrides.items() if accepted(name)})
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in arguments]
    if missing:
        raise ConfigurationError(
            f"{cls.__name__} needs {missing}, which the checkpoint does not hold. Pass them: "
            f"{cls.__name__}.load_from_checkpoint(path, {', '.join(f'{name}=...' for name in missing)})."
        )
    return arguments


def _own_init(cls: type) -> Callable[..., None] | None:
    """The `__init__` that users wrote for `cls` or one of its parents; None when it is our own or torch's."""
    owner = next(kind for kind in cls.__mro__ if "__init__" in vars(kind))
    if owner in (object, nn.Module) or owner.__module__.split(".")[0] == __name__.split(".")[0]:
        return None
    init: Callable[..., None] = vars(owner)["__init__"]
    return init


def _parameters(init: Callable[..., None] | None) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters that can be given by name, and whether any other name is taken too."""
    if init is None:
        return {}, False
    _, *parameters = inspect.signature(init).parameters.values()
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _annotations(init: Callable[..., None] | None, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    scope = getattr(inspect.unwrap(init), "__globals__", {}) if init is not None else {}
    return {p.name: _evaluate(p.annotation, scope) for p in parameters.values() if p.annotation is not p.empty}


def _evaluate(annotation: Any, scope: dict[str, Any]) -> Any:
    """An annotation as an object; None for what cannot be evaluated, as names that only type checkers import."""
    holder = SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(holder, scope)["it"]
    except (AttributeError, NameError, SyntaxError, TypeError):
        return None


def _rebuild(value: Any, hint: Any) -> Any:
    """A stored value as what the annotation asks for; without one, a dict whose items are attributes too."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [kind for member in members if isinstance(kind := typing.get_origin(member) or member, type)]
    if type(value) in kinds:
        return value
    for kind in kinds:
        if isinstance(value, dict) and dataclasses.is_dataclass(kind):
            return _rebuild_dataclass(value, kind)
        if isinstance(value, dict) and issubclass(kind, (Namespace, SimpleNamespace)):
            return kind(**value)
        if isinstance(value, str) and issubclass(kind, (PurePath, torch.device)):
            return kind(value)
        if isinstance(value, list) and issubclass(kind, (set, frozenset)):
            return kind(value)
        if issubclass(kind, enum.Enum) and value is not None:
            return kind(value)
    return AttributeDict(value) if isinstance(value, dict) else value


def _rebuild_dataclass(value: dict[str, Any], kind: type) -> Any:
    scope = vars(sys.modules[kind.__module__])
    hints = {field.name: _evaluate(field.type, scope) for field in dataclasses.fields(kind) if field.init}
    return kind(**{name: _rebuild(item, hints[name]) for name, item in value.items() if name in hints})
