"""What users do with a model as if it were whole, while ranks hold shards: made to work, or refused with the reason.

Within a step a block's parameters are whole in its own forward, those outside blocks everywhere; between steps all are
shards. torch answers what goes beyond that in its own terms, or not at all: gradients that reach a shard past its layer
are never summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigurationError
from .recording import Recording, recorded
from .sharding import sharded_like

_NO_VALUES = ("meta tensor", "meta device type tensor", "register_meta")  # in the words of torch
_TORCH_SAYS = ("mixed torch.Tensor and DTensor", "uniform original parameter dtype")


def with_reasons(step: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`step`, with torch's errors about shards in the user's terms."""

    def run(*args: Any) -> Any:
        try:
            return step(*args)
        except (RuntimeError, AssertionError) as error:
            if _TORCH_SAYS[0] in str(error):
                raise _used_outside("parameters of a block", name) from error
            if _TORCH_SAYS[1] in str(error):
                raise ConfigurationError(
                    f"{name} gathers what a block trains in one type, but there are several: "
                    f"{str(error).partition('got ')[2]}. Train all of it in one, or name smaller blocks=[...]."
                ) from error
            raise

    return run


def refuse_shards_in(loss: Tensor, name: str) -> None:
    """ConfigurationError for a loss of shards, whose backward pass would fail in torch's own terms."""
    if hasattr(loss, "full_tensor"):
        raise _used_outside("parameters of a block", name)


def refuse_stray_gradients(module: nn.Module, name: str) -> list[Any]:
    """Hooks (to be removed) that refuse gradients which no rank would get from the others: those that reach a shard
    past the layer that gathers it, and those of parameters that came after the module was sharded."""

    def refuse(path: str, parameter: nn.Parameter, _: Tensor) -> None:
        if hasattr(parameter, "placements"):
            raise _used_outside(repr(path), name)
        raise ConfigurationError(
            f"{path!r} came into the module after {name} had sharded it, so each rank would train its own. Make it in "
            "__init__ or configure_model; to change a trained module, make a new one and load a checkpoint's weights."
        )

    return [p.register_hook(partial(refuse, path, p)) for path, p in module.named_parameters() if p.requires_grad]


def refuse_hooks(module: nn.Module, name: str, ours: int = 0) -> None:
    """ConfigurationError for a parameter with more than `ours` hooks on its gradient: no backward pass reaches a shard,
    so none would ever run."""
    for path, parameter in module.named_parameters():
        if len(parameter._backward_hooks or ()) > ours:
            raise ConfigurationError(
                f"{path!r} has a hook on its gradient (register_hook), which would never run: {name} gathers "
                "parameters for a backward pass and sums their gradients itself. Change the summed gradient in "
                "on_before_optimizer_step, or with register_post_accumulate_grad_hook in on_fit_start."
            )


def _used_outside(what: str, name: str) -> ConfigurationError:
    return ConfigurationError(
        f"A step used {what} outside the forward of that block, where {name} keeps shards, whose gradients would not "
        "be summed over the ranks. Call the block itself, not another method of it; or call its unshard() before; or "
        "leave it out of blocks=[...]: parameters outside blocks may be used anywhere in a step."
    )


@contextmanager
def on_meta(name: str, recording: Recording) -> Iterator[None]:
    """`configure_model` builds on the meta device, noted in `recording`; ConfigurationError if it needs values."""
    try:
        with recorded(recording):
            yield
    except (RuntimeError, TypeError) as error:
        if not any(word in str(error).lower() for word in _NO_VALUES):
            raise
        raise ConfigurationError(
            f"configure_model reads values that are not there yet ({str(error).partition(chr(10))[0]}): {name} builds "
            "layers on the meta device and shards them before they get values. Build the part that needs them in "
            "__init__, which costs every rank the memory of all of it."
        ) from error


def take_whole_state(module: nn.Module) -> None:
    """Let `load_state_dict`, of the module and of its parts, take whole tensors: each rank keeps its shards."""
    for part in module.modules():
        part.register_load_state_dict_pre_hook(_cut)


def _cut(part: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in part.named_parameters(prefix.removesuffix("."), recurse=False):
        value = state.get(name)
        if hasattr(parameter, "placements") and isinstance(value, Tensor) and not hasattr(value, "placements"):
            state[name] = sharded_like(parameter, value)
