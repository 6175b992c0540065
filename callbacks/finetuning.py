"""`BaseFinetuning` and `BackboneFinetuning`: layers that are frozen at first and thawed as epochs begin.

What is thawed joins the optimizer as a parameter group of its own. A checkpoint knows which parameters are frozen and
which groups joined; a resumed run has both again before the optimizer's state is loaded. `joined_groups.py` makes
learning-rate schedulers know the groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ..errors import CheckpointError, ConfigurationError
from ..trainer.argument_types import checked_types
from ..trainer.arguments import check_count
from ..trainer.callback import Callback
from ..trainer.rank_zero import rank_zero_info, rank_zero_warn
from .joined_groups import let_schedulers_follow

if TYPE_CHECKING:
    from ..trainer.module import Module
    from ..trainer.trainer import Trainer

    Modules = nn.Module | Iterable["Modules"]


class BaseFinetuning(Callback):
    """Override `freeze_before_training` and `finetune_function`; the static methods here do the work.

    Let `configure_optimizers` give the optimizer only what is trainable:
    `[p for p in self.parameters() if p.requires_grad]`.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    # --- what to override ----------------------------------------------------------------------------------------
    def freeze_before_training(self, pl_module: Module) -> None:
        """Freeze what is not trained at first; before the optimizers are made, also in a run that is resumed."""
        raise NotImplementedError("freeze_before_training is not defined")

    def finetune_function(self, pl_module: Module, epoch: int, optimizer: Optimizer) -> None:
        """As an epoch begins, for each optimizer: thaw what its time has come for, change rates."""
        raise NotImplementedError("finetune_function is not defined")

    # --- what to use in it ---------------------------------------------------------------------------------------
    @staticmethod
    def flatten_modules(modules: Modules) -> list[nn.Module]:
        """The layers inside: those without children, and those that have parameters of their own beside children."""
        if isinstance(modules, nn.ModuleDict):
            modules = modules.values()
        if isinstance(modules, nn.Module):
            found = list(modules.modules())
        else:
            found = [layer for part in modules for layer in BaseFinetuning.flatten_modules(part)]
        return [layer for layer in found if not list(layer.children()) or layer._parameters]

    @staticmethod
    def filter_params(modules: Modules, train_bn: bool = True, requires_grad: bool = True) -> Iterator[nn.Parameter]:
        """The parameters that need gradients (or do not); those of BatchNorm only with `train_bn`."""
        for layer in BaseFinetuning.flatten_modules(modules):
            if train_bn or not isinstance(layer, _BatchNorm):
                yield from (p for p in layer.parameters(recurse=False) if p.requires_grad == requires_grad)

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        """Thaw all parameters; BatchNorm keeps statistics again."""
        for layer in BaseFinetuning.flatten_modules(modules):
            _set_frozen(layer, False)

    @staticmethod
    def freeze_module(module: nn.Module) -> None:
        """Freeze one layer's own parameters; BatchNorm keeps no statistics."""
        _set_frozen(module, True)

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """Freeze all parameters; with `train_bn` those of BatchNorm are thawed."""
        for layer in BaseFinetuning.flatten_modules(modules):
            _set_frozen(layer, not (train_bn and isinstance(layer, _BatchNorm)))

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Those of `params` that the optimizer does not have yet; a warning for the others."""
        known = _in_optimizer(optimizer)
        given = list(params)
        new = [p for p in given if id(p) not in known]
        if len(new) < len(given):
            rank_zero_warn(
                f"{len(given) - len(new)} of the parameters to be thawed are in the optimizer already and stay where "
                "they are. Let configure_optimizers take [p for p in self.parameters() if p.requires_grad]."
            )
        return new

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Modules,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Thaw `modules` and give them to the optimizer as a new group.

        Its rate is `lr`, or that of the first group divided by `initial_denom_lr`. Without `train_bn` BatchNorm's
        parameters stay frozen.
        """
        trained = _in_optimizer(optimizer) & {id(p) for p in BaseFinetuning.filter_params(modules)}
        BaseFinetuning.make_trainable(modules)
        if not train_bn:
            for layer in BaseFinetuning.flatten_modules(modules):
                if isinstance(layer, _BatchNorm):
                    _set_frozen(layer, True)
        rate = optimizer.param_groups[0]["lr"] / initial_denom_lr if lr is None else float(lr)
        thawed = (p for p in BaseFinetuning.filter_params(modules, train_bn) if id(p) not in trained)
        params = BaseFinetuning.filter_on_optimizer(optimizer, thawed)
        if params:
            optimizer.add_param_group({"params": params, "lr": rate})

    # --- when ----------------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage == "fit":
            self.freeze_before_training(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        state, self._loaded = self._loaded, None
        if state is None:
            return
        _freeze_as(pl_module, set(state["frozen"]), set(state["without_statistics"]))
        for optimizer, groups in zip(trainer.optimizers, state["groups"], strict=False):
            before = [group["lr"] for group in optimizer.param_groups]
            _add_groups(pl_module, optimizer, groups)
            let_schedulers_follow(trainer.lr_scheduler_configs, optimizer, before)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        for optimizer in trainer.optimizers:
            before = [group["lr"] for group in optimizer.param_groups]
            self.finetune_function(pl_module, trainer.current_epoch, optimizer)
            let_schedulers_follow(trainer.lr_scheduler_configs, optimizer, before)

    # --- what a resumed run must know ------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        if self._loaded is not None or self._module is None:
            return dict(self._loaded or {})
        module = self._module
        names = {id(p): name for name, p in module.named_parameters()}
        optimizers = module._trainer.optimizers if module._trainer is not None else []
        return {
            "frozen": [name for name, p in module.named_parameters() if not p.requires_grad],
            "without_statistics": [
                name
                for name, layer in module.named_modules()
                if isinstance(layer, _BatchNorm) and not layer.track_running_stats
            ],
            "groups": [
                [[names[id(p)] for p in group["params"] if id(p) in names] for group in optimizer.param_groups]
                for optimizer in optimizers
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict)


def multiplicative(epoch: int) -> float:
    """Twice the rate in every epoch."""
    return 2.0


class BackboneFinetuning(BaseFinetuning):
    """Freezes `module.backbone` until epoch `unfreeze_backbone_at_epoch`, then trains it at a rate of its own.

    That begins at `backbone_initial_lr`, or the first group's rate times `backbone_initial_ratio_lr`, and is multiplied
    with `lambda_func(epoch + 1)` in each later epoch; with `should_align` it never exceeds the first group's.
    `train_bn` says whether the backbone's BatchNorm layers are trained, before and after; `verbose` tells the rates,
    rounded to `rounding` digits.
    """

    @checked_types
    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 10e-2,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        super().__init__()
        self.unfreeze_backbone_at_epoch = check_count("unfreeze_backbone_at_epoch", unfreeze_backbone_at_epoch, 0)
        self.lambda_func = lambda_func
        self.backbone_initial_ratio_lr = backbone_initial_ratio_lr
        self.backbone_initial_lr = backbone_initial_lr
        self.should_align = should_align
        self.initial_denom_lr = initial_denom_lr
        self.train_bn = train_bn
        self.verbose = verbose
        self.rounding = rounding
        self.previous_backbone_lr: float | None = None

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if not isinstance(getattr(pl_module, "backbone", None), nn.Module):
            raise ConfigurationError(
                f"BackboneFinetuning needs a layer {type(pl_module).__name__}.backbone. Give the module one in "
                "__init__, or subclass BaseFinetuning."
            )
        super().setup(trainer, pl_module, stage)

    def freeze_before_training(self, pl_module: Module) -> None:
        self.freeze(pl_module.backbone, train_bn=self.train_bn)

    def finetune_function(self, pl_module: Module, epoch: int, optimizer: Optimizer) -> None:
        if epoch < self.unfreeze_backbone_at_epoch:
            return
        head_lr = optimizer.param_groups[0]["lr"]
        if epoch == self.unfreeze_backbone_at_epoch:
            given = self.backbone_initial_lr
            lr = head_lr * self.backbone_initial_ratio_lr if given is None else given
            self.unfreeze_and_add_param_group(
                pl_module.backbone,
                optimizer,
                lr,
                initial_denom_lr=self.initial_denom_lr,
                train_bn=self.train_bn,
            )
        else:
            assert self.previous_backbone_lr is not None
            lr = self.lambda_func(epoch + 1) * self.previous_backbone_lr
            lr = min(lr, head_lr) if self.should_align else lr
            optimizer.param_groups[-1]["lr"] = lr
        self.previous_backbone_lr = lr
        if self.verbose:
            rank_zero_info(f"Current lr: {round(head_lr, self.rounding)}, Backbone lr: {round(lr, self.rounding)}")

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "previous_backbone_lr": self.previous_backbone_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]
        super().load_state_dict(state_dict)


def _in_optimizer(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _set_frozen(layer: nn.Module, frozen: bool) -> None:
    if isinstance(layer, _BatchNorm):
        layer.track_running_stats = not frozen
    for parameter in layer.parameters(recurse=False):
        parameter.requires_grad = not frozen


def _freeze_as(module: Module, frozen: set[str], without_statistics: set[str]) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad = name not in frozen
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            layer.track_running_stats = name not in without_statistics


def _add_groups(module: Module, optimizer: Optimizer, groups: list[list[str]]) -> None:
    """Add those of `groups`, of parameters' names, that the optimizer does not have; their options are loaded later."""
    parameters = dict(module.named_parameters())
    for names in groups[len(optimizer.param_groups) :]:
        missing = [name for name in names if name not in parameters]
        if missing:
            raise CheckpointError(
                f"The checkpoint was saved while the parameter {missing[0]!r} was finetuned, which the module does not "
                "have. Resume with the module that it was saved with."
            )
        optimizer.add_param_group({"params": [parameters[name] for name in names]})
