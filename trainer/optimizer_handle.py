"""`OptimizerHandle`: what `self.optimizers()` returns, and what an overridden `optimizer_step` is given.

It is the optimizer in all but `step`, which goes through the strategy. Toggling, which leaves gradients only to the
parameters of one optimizer, is here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

# Type checkers see an optimizer, so that a handle goes wherever one is asked for. At run time nothing is inherited:
# an inherited method would act on the handle's own, empty state.
if TYPE_CHECKING:
    from .module import Module

    _Base = Optimizer
else:
    _Base = object


class OptimizerHandle(_Base):
    """An optimizer whose `step` is the strategy's: it scales, counts, and may be skipped under 16-mixed.

    Everything else is the wrapped optimizer's, `isinstance` included; `handle.optimizer` is that one. `stepper` steps
    it and says whether it did; `stepped` counts the steps done. A copied or pickled handle is the bare optimizer.
    """

    optimizer: Optimizer
    stepped: int
    _stepper: Callable[..., bool]
    _module: Module | None

    def __init__(self, optimizer: Optimizer, stepper: Callable[..., bool], module: Module | None = None) -> None:
        self.__dict__.update(optimizer=optimizer, stepped=0, _stepper=stepper, _module=module)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step, and return what `closure` returned when it was first called, as torch's optimizers do.

        `kwargs` go through the stepper to the optimizer's own step.
        """
        returned: list[Any] = []

        def noting_closure() -> Any:
            assert closure is not None
            returned.append(closure())
            return returned[-1]

        if self._stepper(self.optimizer, None if closure is None else noting_closure, **kwargs):
            self.stepped += 1
        return returned[0] if returned else None

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Only this optimizer's parameters need gradients inside: `with optimizer.toggle_model(): ...`.

        `sync_grad` changes nothing: `manual_backward` averages all gradients over the ranks, and doing that again
        after more backward passes is harmless.
        """
        if self._module is None:
            raise RuntimeError("toggle_model() works on what self.optimizers() returns.")
        self._module.toggle_optimizer(self)
        try:
            yield
        finally:
            self._module.untoggle_optimizer(self)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Optimizer]:  # type: ignore[override]
        return type(self.optimizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # A scheduler made with a handle replaces `step`: the handle's, or the two would call each other for ever.
        if name in ("stepped", "step"):
            self.__dict__[name] = value
        else:
            setattr(self.optimizer, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.optimizer, name)

    def __dir__(self) -> list[str]:
        return [*dir(self.optimizer), "optimizer", "stepped", "toggle_model"]

    def __repr__(self) -> str:
        return repr(self.optimizer)

    def __reduce__(self) -> tuple[Any, ...]:
        return bare, (self.optimizer,)


def bare(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, given it or its handle."""
    return optimizer.optimizer if isinstance(optimizer, OptimizerHandle) else optimizer


def toggle_optimizer(module: nn.Module, optimizer: Optimizer, all_optimizers: Iterable[Optimizer]) -> None:
    """Only the parameters of `optimizer` need gradients, as far as they did; those of the others do not.

    Toggling another one before `untoggle_optimizer` switches to it.
    """
    before: dict[Tensor, bool] = vars(module).setdefault("_requires_grad_before", {})
    for parameter in _parameters(all_optimizers):
        before.setdefault(parameter, parameter.requires_grad)
        parameter.requires_grad_(False)
    for parameter in _parameters([optimizer]):  # those shared with another optimizer, too
        parameter.requires_grad_(before.get(parameter, parameter.requires_grad))


def untoggle_optimizer(module: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Every parameter needs gradients again just as before `toggle_optimizer`; nothing where none was toggled."""
    for parameter, required in vars(module).pop("_requires_grad_before", {}).items():
        parameter.requires_grad_(required)


def _parameters(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]
