"""`AveragedWeights`: running averages of a module's parameters (and buffers), beside them and by their names.

The semantics are those of `torch.optim.swa_utils.AveragedModel`, whose `avg_fn` and `multi_avg_fn` fit here. The
differences: no second module is made; how many were averaged is counted on the host, so an update waits for no device;
tensors of whole numbers (BatchNorm counts its batches) are copied, since their mean means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

AverageFunction = Callable[[Tensor, Tensor, Any], Tensor]
MultiAverageFunction = Callable[[list[Tensor], list[Tensor], Any], Any]


class AveragedWeights:
    """The averages of `module`'s tensors as they are now, so far of one; `device` None: each beside its tensor."""

    def __init__(self, module: nn.Module, device: torch.device | None = None, buffers: bool = True) -> None:
        self._buffers = buffers
        self.count = 1
        self.tensors = {
            name: tensor.detach().to(device or tensor.device, copy=True) for name, tensor in self.named(module)
        }

    def named(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `module` that are averaged, shared ones once."""
        return chain(module.named_parameters(), module.named_buffers() if self._buffers else ())

    @torch.no_grad()
    def update(
        self,
        module: nn.Module,
        avg_fn: AverageFunction | None = None,
        multi_avg_fn: MultiAverageFunction | None = None,
    ) -> None:
        """Take the module's present tensors into the average; by default all that were taken in weigh the same."""
        groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for name, tensor in self.named(module):
            average = self.tensors[name]
            present = tensor.detach().to(average.device)
            if not (average.is_floating_point() or average.is_complex()):
                average.copy_(present)
            elif avg_fn is not None:
                average.copy_(avg_fn(average, present, self.count))
            else:
                averages, tensors = groups.setdefault((average.device, average.dtype), ([], []))
                averages.append(average)
                tensors.append(present)
        for averages, tensors in groups.values():
            (multi_avg_fn or _running_mean)(averages, tensors, self.count)
        self.count += 1

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the contents of the averages and the module's tensors; storage and gradients stay where they are."""
        for name, tensor in self.named(module):
            average = self.tensors[name]
            held = tensor.detach().to(average.device, copy=True)
            tensor.copy_(average)
            average.copy_(held)

    @torch.no_grad()
    def put(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Give the module the values of `tensors`, such as the averages."""
        for name, tensor in self.named(module):
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over the values of `tensors`; names that are not there keep theirs."""
        for name, tensor in tensors.items():
            if name in self.tensors:
                self.tensors[name].copy_(tensor)

    def all_names(self, module: nn.Module) -> Iterator[tuple[str, str]]:
        """(name, name here) of every tensor of the module under each name that it has: shared ones have several."""
        first = {id(tensor): name for name, tensor in self.named(module)}
        for name, tensor in chain(
            module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
        ):
            if id(tensor) in first:
                yield name, first[id(tensor)]


def _running_mean(averages: list[Tensor], tensors: list[Tensor], count: int) -> None:
    torch._foreach_lerp_(averages, tensors, 1.0 / (count + 1))
