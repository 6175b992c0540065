"""`ModelSummary`: a table of the layers, their parameters and modes, printed once as `fit` starts.

`summarize(module)` gives the same as data, without a trainer. Where the module has an `example_input_array`, one
forward pass in evaluation mode tells the layers' input and output sizes; it moves no random stream.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..trainer.argument_types import checked_types
from ..trainer.arguments import check_count
from ..trainer.callback import Callback
from ..trainer.metric_objects import modes_kept
from ..trainer.prefetch import move
from ..trainer.rng import isolated

if TYPE_CHECKING:
    from ..trainer.module import Module
    from ..trainer.trainer import Trainer

_UNKNOWN = "?"
_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


class ModelSummary(Callback):
    """Prints the table on rank 0; `max_depth` 1 shows the module's own layers, -1 all, 0 nothing."""

    @checked_types
    def __init__(self, max_depth: int = 1) -> None:
        self._max_depth = check_count("max_depth", max_depth, 0, (-1,))

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self._max_depth == 0 or not (trainer.is_global_zero or trainer.strategy.sharded):
            return
        summary = summarize(pl_module, self._max_depth)  # where parameters are split, its forward pass needs every rank
        if trainer.is_global_zero:
            self.show(summary)

    @staticmethod
    def show(summary: Summary) -> None:
        """Print `summary`; override it to put it elsewhere."""
        if not sys.stdout.isatty():
            print(summary, flush=True)
            return
        from rich.console import Console

        Console().print(rich_table(summary))
        print(summary.totals(), flush=True)


@dataclass
class Layer:
    """A row of the table. `training` is None for parameters that belong to no layer."""

    name: str
    kind: str
    parameters: int
    training: bool | None
    in_size: Any = None
    out_size: Any = None


def _column(field: str) -> Any:
    return property(lambda summary: [getattr(layer, field) for layer in summary.layers])


@dataclass
class Summary:
    """A module's layers and what they come to; `str()` is the table. `sized`: a forward pass told the sizes."""

    layers: list[Layer]
    trainable_parameters: int
    total_parameters: int
    model_size: float
    """Megabytes (1e6 bytes) of parameters."""
    modules_in_train_mode: int
    modules_in_eval_mode: int
    uninitialized: int = 0
    sized: bool = False

    layer_names = _column("name")
    layer_types = _column("kind")
    param_nums = _column("parameters")
    in_sizes = _column("in_size")  # a shape, a list of shapes, "?" where it never came to one
    out_sizes = _column("out_size")

    def heads(self) -> list[str]:
        """The names of the columns."""
        return ["", "Name", "Type", "Params", "Mode"] + (["In sizes", "Out sizes"] if self.sized else [])

    def rows(self) -> list[list[str]]:
        """The table's cells."""
        return [
            [
                str(number),
                layer.name,
                layer.kind,
                human_count(layer.parameters),
                {True: "train", False: "eval", None: "n/a"}[layer.training],
                *((str(layer.in_size), str(layer.out_size)) if self.sized else ()),
            ]
            for number, layer in enumerate(self.layers)
        ]

    def totals(self) -> str:
        """The lines below the table."""
        frozen = self.total_parameters - self.trainable_parameters
        lines = [
            (human_count(self.trainable_parameters), "Trainable params"),
            (human_count(frozen), "Non-trainable params"),
            (human_count(self.total_parameters), "Total params"),
            (f"{self.model_size:,.3f}", "Total estimated model params size (MB)"),
            (str(self.modules_in_train_mode), "Modules in train mode"),
            (str(self.modules_in_eval_mode), "Modules in eval mode"),
        ]
        if self.uninitialized:
            lines.append((str(self.uninitialized), "Params of lazy layers, not counted: their shape is unknown yet"))
        return "\n".join(f"{number:<10}{what}" for number, what in lines)

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(self.heads(), *rows, strict=True)]
        lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        head = " | ".join(cell.ljust(width) for cell, width in zip(self.heads(), widths, strict=True))
        rule = "-" * len(head)
        return "\n".join([head.rstrip(), rule, *(line.rstrip() for line in lines), rule, self.totals()])


def summarize(module: nn.Module, max_depth: int = 1) -> Summary:
    """The layers of `module` down to `max_depth` (-1: all), with sizes where it has an `example_input_array`.

    Raises ConfigurationError for another depth, and whatever the forward pass of the example raises.
    """
    check_count("max_depth", max_depth, 0, (-1,))
    found = list(_layers(module, max_depth))
    rows = [
        Layer(name, type(layer).__name__, _count(layer.parameters()), layer.training, _UNKNOWN, _UNKNOWN)
        for name, layer in found
    ]
    in_layers = {id(p) for _, layer in found for p in layer.parameters()}
    left = [p for p in module.parameters() if id(p) not in in_layers]
    if left and found:
        rows.append(Layer("other params", "n/a", _count(left), None, _UNKNOWN, _UNKNOWN))
    example = getattr(module, "example_input_array", None)
    if example is not None:
        _find_sizes(module, example, rows, [layer for _, layer in found])
    parameters = list(module.parameters())
    known = [p for p in parameters if not isinstance(p, UninitializedParameter)]
    modes = [part.training for part in module.modules() if part is not module]
    return Summary(
        layers=rows,
        trainable_parameters=_count(p for p in known if p.requires_grad),
        total_parameters=_count(known),
        model_size=sum(p.numel() * p.element_size() for p in known) / 1e6,
        modules_in_train_mode=sum(modes),
        modules_in_eval_mode=len(modes) - sum(modes),
        uninitialized=len(parameters) - len(known),
        sized=example is not None,
    )


def rich_table(summary: Summary) -> Any:
    """The table of `summary` for rich's console."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(header_style="bold")
    for head in summary.heads():
        table.add_column(head, justify="right" if head == "Params" else "left", overflow="fold")
    for row in summary.rows():
        table.add_row(*map(escape, row))
    return table


def human_count(number: int) -> str:
    """`123`, `1.2 K`, `34.0 M`: at most four characters and a unit."""
    for size, unit in _UNITS:
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return str(number)


def _layers(module: nn.Module, max_depth: int) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in module.named_modules():
        if name and (max_depth == -1 or name.count(".") < max_depth):
            yield name, layer


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters if not isinstance(p, UninitializedParameter))


def _find_sizes(module: nn.Module, example: Any, rows: Sequence[Layer], layers: Sequence[nn.Module]) -> None:
    """Fill in the sizes that one forward pass of `example` shows; a layer that is used twice shows its last use."""

    def note(row: Layer) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            row.in_size, row.out_size = _shapes(args[0] if len(args) == 1 else args), _shapes(output)

        return hook

    handles = [layer.register_forward_hook(note(row)) for layer, row in zip(layers, rows, strict=False)]
    try:
        with modes_kept(module), isolated(), torch.no_grad():
            module.eval()
            _forward(module, example)
    finally:
        for handle in handles:
            handle.remove()


def _forward(module: nn.Module, example: Any) -> None:
    """`example` is the one argument, a list or tuple of all, or a dict of keyword arguments."""
    trainer, like = getattr(module, "_trainer", None), next(iter(module.parameters()), None)
    if trainer is not None:
        example = trainer.strategy.batch_to_device(example, move)
    elif like is not None:
        example = move(example, like.device)

    def step() -> Any:
        if isinstance(example, dict):
            return module(**example)
        return module(*example) if isinstance(example, (list, tuple)) else module(example)

    (step if trainer is None else trainer.strategy.evaluation_step(step))()


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return list(value.shape)
    if isinstance(value, (list, tuple)):
        return [_shapes(item) for item in value]
    return _UNKNOWN
