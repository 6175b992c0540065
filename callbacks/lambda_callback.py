"""`LambdaCallback`: a callback out of functions, without a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import ConfigurationError, UnknownArgumentError, did_you_mean
from ..trainer.callback import Callback

#: The hooks that may be given: every hook of `Callback`.
HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown"))


class LambdaCallback(Callback):
    """`LambdaCallback(on_train_epoch_end=lambda trainer, pl_module: print(trainer.current_epoch))`.

    Each argument is a hook's name, its value the function to call with the hook's arguments; None is left out.
    """

    def __init__(self, **hooks: Callable[..., Any] | None) -> None:
        for name, function in hooks.items():
            if name not in HOOKS:
                near = did_you_mean(name, HOOKS)
                raise UnknownArgumentError(f"LambdaCallback({name}=...): there is no such hook. {near}")
            if function is None:
                continue
            if not callable(function):
                raise ConfigurationError(
                    f"LambdaCallback({name}={function!r:.80}): expected a function, got a {type(function).__name__}."
                )
            setattr(self, name, function)
