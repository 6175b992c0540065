"""FSDP2 applied to a module: blocks first, the rest with the root, so that every parameter becomes one rank's shard.

`shard` is the whole story; `Sharding` says how. Gradients are summed over the ranks and never divided: a loss carries
its share of the window already, and a division would need a reduction that gloo lacks. torch's FSDP and DTensor are
imported where they are used: they take a second, and change warning filters as they load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigurationError
from .precision import Precision

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class Sharding:
    """How a module is sharded; the options of `FSDP`, resolved for one run."""

    mesh: DeviceMesh
    device: torch.device
    precision: Precision
    reshard_after_forward: bool | int | None
    forward_prefetch: int
    cpu_offload: bool
    activation_checkpointing: bool
    find_unused_parameters: bool

    def apply(self, module: nn.Module, root: bool = False) -> None:
        """`fully_shard` with these options."""
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        mixed = self.precision.autocast
        fully_shard(
            module,
            mesh=self.mesh,
            reshard_after_forward=self.reshard_after_forward,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=mixed,
                reduce_dtype=torch.float32 if mixed is not None else None,
                cast_forward_inputs=not root,  # the root's are the batch, whose float targets must stay as they are
            ),
            offload_policy=CPUOffloadPolicy(pin_memory=self.device.type != "cpu")
            if self.cpu_offload
            else OffloadPolicy(),
        )


def shard(roots: Iterable[nn.Module], blocks: list[nn.Module], sharding: Sharding) -> None:
    """Shard `blocks` and then what is left of each of `roots`, in place; rank 0's values win. A collective.

    A module in host memory goes to the device block by block, so the device never holds more than one block and the
    shards; one on the meta device stays there, sharded, until `initialise` fills it.
    """
    from torch.distributed.fsdp import FSDPModule

    roots = list(roots)
    for part in (*reversed(blocks), *roots):  # blocks within blocks come behind these, and are sharded first
        move_and_agree(part, sharding.device)
        if sharding.activation_checkpointing and part not in roots:
            _checkpoint_activations(part)
        if not isinstance(part, FSDPModule):  # a user's `parallelize` may have done it
            sharding.apply(part, root=part in roots)
    for sharded in (part for root in roots for part in fsdp_modules(root)):
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        if sharding.find_unused_parameters:
            _reduce_unused(sharded)
    if sharding.forward_prefetch:
        held: list[Any] = blocks
        for i, block in enumerate(held):
            block.set_modules_to_forward_prefetch(held[i + 1 : i + 1 + sharding.forward_prefetch])


def fsdp_modules(root: nn.Module) -> Iterator[FSDPModule]:
    """Every part of `root` that `fully_shard` was applied to."""
    from torch.distributed.fsdp import FSDPModule

    return (part for part in root.modules() if isinstance(part, FSDPModule))


def reshard(roots: Iterable[nn.Module]) -> None:
    """Free what is gathered, after a step without a backward pass; parameters are shards again."""
    for root in roots:
        for part in fsdp_modules(root):
            part.reshard()


def forget_unreduced(roots: Iterable[nn.Module]) -> None:
    """Drop gradients that were kept back from reduction within a window that is given up."""
    # torch has no public way to do so; what is not there any more in some version needs no dropping.
    for root in roots:
        for part in fsdp_modules(root):
            state: Any = part._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for parameter in (p for group in groups if group is not None for p in group.fsdp_params):
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):
                    parameter._unsharded_param.grad = None


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; a collective where it is sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, full: Tensor) -> Tensor:
    """`full`, alike on all ranks, sharded as the DTensor `tensor` is; nothing is communicated."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(tensor, DTensor)
    moved = full.to(tensor.device_mesh.device_type, tensor.dtype)
    return distribute_tensor(moved, tensor.device_mesh, tensor.placements, src_data_rank=None)


def is_meta(module: nn.Module) -> bool:
    """Whether anything of the module still lacks its data."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def move_and_agree(part: nn.Module, device: torch.device) -> None:
    """Move what is not sharded yet to the device, with the values that rank 0 has."""
    from torch.distributed.tensor import DTensor

    for tensor in (*part.parameters(), *part.buffers()):
        if isinstance(tensor, DTensor):
            continue
        if not tensor.is_contiguous():  # as in channels_last, which `fully_shard` refuses
            tensor.data = tensor.data.contiguous()
        if tensor.is_meta:
            continue
        if tensor.device != device:
            tensor.data = tensor.data.to(device)
        dist.broadcast(tensor.detach(), 0)


def _reduce_unused(part: Any) -> None:
    """Let `part` reduce zeros in the place of gradients that are not there."""
    if not hasattr(part, "set_reduce_scatter_unused_params"):
        raise ConfigurationError(
            f"find_unused_parameters=True needs torch 2.13, this is {torch.__version__}. Use every parameter on every "
            "rank (`loss + 0 * sum(p.sum() for p in unused)`), or strategy='ddp_find_unused_parameters_true'."
        )
    part.set_reduce_scatter_unused_params(True, recurse=False)


def _checkpoint_activations(block: nn.Module) -> None:
    """Let `block` keep only its inputs and compute again in the backward pass, with the random numbers it had."""
    # Its names stay; `fully_shard` gathers the parameters around it, so they are not gathered a second time.
    forward = block.forward
    if not (isinstance(forward, partial) and forward.func is checkpoint):
        block.forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=True)
