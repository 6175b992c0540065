"""Hooks, found once per call: which are overridden, in which order they run, and which names are misspelt.

`Hooks` holds a tuple of callables for every hook that callbacks and the module share; an empty tuple costs the loop
nothing. Each callable notes the hook under way, so that `self.log` knows where it is called.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from .callback import Callback
from .module import Module

if TYPE_CHECKING:
    from .datamodule import DataModule
    from .metrics import Metrics
    from .trainer import Trainer

#: The hooks of callbacks (with `trainer, pl_module` in front) that are found once; the others are called by name.
_FOUND = tuple(
    name
    for name in vars(Callback)
    if name.startswith("on_") and name not in ("on_exception", "on_save_checkpoint", "on_load_checkpoint")
)
#: Those that the module has too; callbacks' come first.
SHARED_HOOKS = tuple(name for name in _FOUND if name in vars(Module))
#: Where checkpoint and early-stopping callbacks act on metrics and on the state that the others leave: after them.
_ACTED_AT = ("on_train_batch_end", "on_train_epoch_end")
#: Hooks that Lightning had once, and how to write them now.
REMOVED_HOOKS = {
    "training_epoch_end": "collect outputs in training_step and use on_train_epoch_end",
    "validation_epoch_end": "collect outputs in validation_step and use on_validation_epoch_end",
    "test_epoch_end": "collect outputs in test_step and use on_test_epoch_end",
    "training_step_end": "do it at the end of training_step",
    "validation_step_end": "do it at the end of validation_step",
    "test_step_end": "do it at the end of test_step",
    "on_epoch_start": "use on_train_epoch_start",
    "on_epoch_end": "use on_train_epoch_end",
    "on_batch_start": "use on_train_batch_start",
    "on_batch_end": "use on_train_batch_end",
    "on_pretrain_routine_start": "use on_fit_start",
    "on_pretrain_routine_end": "use on_fit_start",
    "on_init_start": "use setup",
    "on_init_end": "use setup",
    "on_configure_sharded_model": "use configure_model of the module",
    "configure_sharded_model": "use configure_model",
    "on_before_accelerator_backend_setup": "use setup",
    "on_load_checkpoint_start": "use on_load_checkpoint",
    "on_hpc_save": "use on_save_checkpoint",
    "on_hpc_load": "use on_load_checkpoint",
    "on_keyboard_interrupt": "use on_exception",
    "tbptt_split_batch": "use manual optimization",
    "get_progress_bar_dict": "use ProgressBar.get_metrics",
    "on_post_move_to_device": "tie weights in __init__ or configure_model",
    "optimizer_zero_gradient": "use optimizer_zero_grad",
    "train_dataloaders": "use train_dataloader",
}


def overridden(obj: Any, name: str, base: type) -> bool:
    """True when `obj` has a `name` of its own, in its class or set on the object, other than `base`'s."""
    method = getattr(obj, name, None)
    if method is None:
        return False
    return getattr(method, "__func__", method) is not getattr(base, name, None)


class Hooks:
    """The hooks of one call of the trainer, by name: `for hook in hooks.on_train_batch_start: hook(batch, idx)`."""

    def __init__(self, trainer: Trainer, module: Module, callbacks: Sequence[Callback], metrics: Metrics) -> None:
        self._metrics = metrics
        for name in _FOUND:
            owners = [callback for callback in callbacks if overridden(callback, name, Callback)]
            last = [owner for owner in owners if name in _ACTED_AT and getattr(owner, "acts_on_metrics", False)]
            found = [self.noting(name, owner, trainer, module) for owner in owners if owner not in last]
            if name in SHARED_HOOKS and overridden(module, name, Module):
                found.append(self.noting(name, module))
            setattr(self, name, tuple(found))
            if name in _ACTED_AT:
                acting = [self.noting("", owner, trainer, module, method=name) for owner in last]
                setattr(self, f"{name}_acting", tuple(acting))

    def __getattr__(self, name: str) -> tuple[Callable[..., Any], ...]:
        raise AttributeError(f"there is no hook {name!r}")

    def noting(self, name: str, owner: Any, *head: Any, method: str | None = None) -> Callable[..., Any]:
        """`owner`'s hook `name` (or its `method`), called with `head` first, inside which `self.log` knows the hook."""
        function, metrics = getattr(owner, method or name), self._metrics
        if name.endswith(("_batch_start", "_batch_end")) and name.startswith(
            ("on_validation", "on_test", "on_predict")
        ):
            function = without_missing(function, len(head) + (4 if name.endswith("_end") else 3), "dataloader_idx")

        def hook(*args: Any) -> Any:
            before, metrics.hook = metrics.hook, name
            result = function(*head, *args)
            metrics.hook = before  # with manual optimization hooks are called inside of training_step
            return result

        hook.__qualname__ = f"{type(owner).__qualname__}.{method or name}"  # what a profiler calls it
        return hook

    def own(self, module: Module, name: str) -> Callable[..., Any] | None:
        """A hook of the module alone, as `optimizer_step`; None where the user did not override it."""
        return self.noting(name, module) if overridden(module, name, Module) else None


def without_missing(function: Callable[..., Any], most: int, *optional: str) -> Callable[..., Any]:
    """`function` as callable with `most` positional arguments, leaving out trailing ones that it does not take.

    `batch_idx` and `dataloader_idx` may be left out of a signature; `optional` are their names, in order.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return function
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keyword_only = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    if len(positional) >= most:
        return function
    taken = len(positional)
    by_keyword = [name for name in optional if name in keyword_only]
    if by_keyword:
        places = {name: most - len(optional) + i for i, name in enumerate(optional)}
        return lambda *args: function(
            *args[:taken], **{n: args[places[n]] for n in by_keyword if places[n] < len(args)}
        )
    return lambda *args: function(*args[:taken])


def check_names(obj: Callback | Module | DataModule, base: type) -> None:
    """Refuse methods that look like hooks but are none, naming the real one; ConfigurationError."""
    known = {name for name in dir(base) if not name.startswith("_")}
    hooks = sorted(name for name in known if name.startswith("on_") or name.endswith("_step") or name in _LOOK_ALIKE)
    for name in dir(type(obj)):
        if name.startswith("_") or name in known or not callable(getattr(type(obj), name, None)):
            continue
        if name in REMOVED_HOOKS:
            raise ConfigurationError(
                f"{type(obj).__name__}.{name} is no hook (any more) and would never be called: {REMOVED_HOOKS[name]}."
            )
        written_out = re.sub("^on_val(id)?_", "on_validation_", name)
        near = difflib.get_close_matches(written_out, hooks, 1, 0.85 if name.startswith("on_") else 0.9)
        if near and _only_misspelt(name, near[0]):
            raise ConfigurationError(
                f"{type(obj).__name__}.{name} is no hook and would never be called. Did you mean {near[0]}? "
                "If it is meant to be a helper, give it a name that is less like a hook's."
            )


_LOOK_ALIKE = frozenset(
    [
        "setup",
        "teardown",
        "configure_optimizers",
        "configure_model",
        "configure_callbacks",
        "prepare_data",
        "train_dataloader",
        "val_dataloader",
        "test_dataloader",
        "predict_dataloader",
        "state_dict",
        "load_state_dict",
        "optimizer_zero_grad",
        "configure_gradient_clipping",
        "transfer_batch_to_device",
    ]
)


def _only_misspelt(name: str, hook: str) -> bool:
    """A word more or other in the middle is another name (`on_train_epoch_end_log`); letters are a slip."""
    words, hook_words = name.split("_"), hook.split("_")
    if name.startswith("on_"):
        return True
    return len(words) == len(hook_words) or name.replace("_", "") == hook.replace("_", "")
