"""`FSDP`: parameters, gradients and optimizer states are split over the ranks; layers are gathered as they are used.

Built on torch's FSDP2 (`fully_shard`). `place` shards the module, so `configure_optimizers` already sees shards;
`sharding.py` says how, `blocks.py` which layers go together, `initialise.py` how a model from the meta device gets its
values. Surprising: gradients are summed over the ranks, not averaged, which is why `gradient_divisor` is 1.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigurationError
from . import sharding
from .base import Strategy, register_strategy
from .blocks import described, find_blocks, named_blocks, without_shared
from .cluster import Cluster
from .estimate import gb
from .initialise import attributes_of, initialise, views_of
from .precision import Precision
from .recording import Recording
from .same_use import SameUse
from .shardable import check_module, children_with_parameters, refuse_other
from .steps import Steps
from .whole_use import on_meta, refuse_shards_in, refuse_stray_gradients, take_whole_state, with_reasons

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@register_strategy("fsdp")
class FSDP(Strategy):
    """Fully sharded data parallel over all ranks.

    `blocks`: the layers to shard one by one, as classes, class names or paths; by default the layers that the model
    repeats. A module with `parallelize(mesh)` shards its parts itself; what it leaves is sharded here.
    `reshard_after_forward`: free a gathered block after its forward pass and gather it again in the backward pass
    (True, the default), keep it (False: faster, more memory), or share it among so many ranks (an int).
    `forward_prefetch`: how many blocks ahead are gathered early. `cpu_offload`: shards live in host memory.
    `activation_checkpointing`: a block keeps only its inputs and computes again in the backward pass.
    `autocast`: whether "*-mixed" computes as under every other strategy, norms and losses in float32 (the default);
    without it all of a block computes in the low precision, as in most hand-written `fully_shard` loops.
    `find_unused_parameters`: a rank may leave out of its loss what others train, if it is in no block: experts, heads
    of tasks. What no rank used then counts as used, with a gradient of zero.
    `sync_every_micro_batch`: False saves communication within a window of several micro-batches and costs every rank
    the memory of the whole model's gradients.
    """

    distributed = True
    sharded = True
    evaluation_communicates = True

    def __init__(
        self,
        *,
        blocks: Sequence[type[nn.Module] | str] | type[nn.Module] | str | None = None,
        reshard_after_forward: bool | int | None = None,
        forward_prefetch: int = 0,
        cpu_offload: bool = False,
        activation_checkpointing: bool = False,
        autocast: bool = True,
        find_unused_parameters: bool = False,
        sync_every_micro_batch: bool = True,
    ) -> None:
        super().__init__()
        one = isinstance(blocks, (str, type, nn.Module))
        self.blocks: Any = [blocks] if one else blocks
        self.reshard_after_forward = reshard_after_forward
        self.forward_prefetch = forward_prefetch
        self.cpu_offload = cpu_offload
        self.activation_checkpointing = activation_checkpointing
        self.autocast = autocast
        self.find_unused_parameters = find_unused_parameters
        self.sync_every_micro_batch = sync_every_micro_batch
        self._mesh: DeviceMesh | None = None
        self._recording = Recording()
        self._roots: list[nn.Module] = []
        self._unreduced = False
        self._refusals: list[Any] = []
        self._same_use = SameUse()

    # --- ranks ---------------------------------------------------------------------------------------------------
    @property
    def gradient_divisor(self) -> int:
        """1: gradients are summed, and a loss carries its whole share of the window."""
        return 1

    @property
    def mesh(self) -> DeviceMesh:
        """The ranks over which parameters are sharded; the first use is a collective."""
        if self._mesh is None:
            self._mesh = self._make_mesh()
        return self._mesh

    def _make_mesh(self) -> DeviceMesh:
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (self.world_size,), mesh_dim_names=("shard",))

    def take_place(self, device: torch.device, cluster: Cluster | None) -> None:
        """As the base class does; one rank alone has nothing to shard."""
        super().take_place(device, cluster)
        self.sharded = self.evaluation_communicates = self.world_size > 1

    def disconnect(self) -> None:
        """Leave the job."""
        self._mesh, self._roots = None, []
        super().disconnect()

    # --- the module ----------------------------------------------------------------------------------------------
    def building(self) -> AbstractContextManager[Any]:
        """`configure_model` builds on the meta device: `place` gives each rank its shards and their values."""
        if not self.sharded:
            return nullcontext()
        self._recording = Recording()
        return on_meta(self.name, self._recording)

    def place(self, module: nn.Module, precision: Precision) -> None:
        """Shard the module; one that is sharded already, by an earlier call, stays as it is."""
        if not self.sharded:
            super().place(module, precision)
            return
        self.module, self.precision = module, precision
        self.scaler = torch.amp.GradScaler(self.device.type) if precision.scaled else None
        options = self._options()
        held = module.__dict__.get("_sharded_roots")
        if held is not None:
            self._roots, before = held
            refuse_other(options, before)
            if sharding.is_meta(module):
                raise ConfigurationError(
                    f"configure_model of {type(module).__name__} built layers anew in a second call, so what was "
                    "trained is lost. Begin it with a return where they are there: `if hasattr(self, ...): return`."
                )
            return
        check_module(module, self)
        meta = sharding.is_meta(module)
        views, attributes = views_of(module, self._recording), attributes_of(module, self._recording)
        module.to(dtype=precision.parameters)
        by_hand = not getattr(module, "automatic_optimization", True)
        self._roots = children_with_parameters(module) if by_hand else [Steps(module)]
        blocks = self._find_blocks(module)
        sharding.shard(self._roots, [block for block in blocks if block not in self._roots], options)
        if meta:
            device = torch.device("cpu") if self.cpu_offload else self.device
            self._recording.start = self.broadcast_object(self._recording.start)
            initialise(module, device, self._recording, views, attributes, self.filled_later)
            self._recording = Recording()
        for part in module.modules():
            if not any(True for _ in part.parameters()):
                part.to(self.device)  # a metric moves its state itself
        if self.rank == 0:
            print(self._told(module, blocks, meta), flush=True)
        take_whole_state(module)
        module.__dict__["_sharded_roots"] = self._roots, options

    def _options(self) -> sharding.Sharding:
        return sharding.Sharding(
            mesh=self.mesh,
            device=self.device,
            precision=self.precision,
            reshard_after_forward=self.reshard_after_forward,
            forward_prefetch=self.forward_prefetch,
            cpu_offload=self.cpu_offload,
            activation_checkpointing=self.activation_checkpointing,
            find_unused_parameters=self.find_unused_parameters,
        )

    def _find_blocks(self, module: nn.Module) -> list[nn.Module]:
        parallelize = getattr(module, "parallelize", None)
        if callable(parallelize):
            sharding.move_and_agree(module, self.device)
            parallelize(self.mesh)
            sharded: list[Any] = list(sharding.fsdp_modules(module))
            return sharded
        found = find_blocks(module) if self.blocks is None else named_blocks(module, self.blocks)
        kept, left = without_shared(module, found)
        if left and self.rank == 0:
            print(
                f"{self.name}: {', '.join(left)} share parameters with other parts of the model, so they are gathered "
                "with the rest of it.",
                flush=True,
            )
        return kept

    def _told(self, module: nn.Module, blocks: list[nn.Module], meta: bool) -> str:
        """One line: what was sharded, and what it cost to build."""
        count = sum(p.numel() for p in module.parameters())
        text = f"{self.name}: {count:,} parameters over {'x'.join(map(str, self.mesh.shape))} ranks in "
        if blocks:
            text += f"{described(module, blocks)} and the rest"
        else:
            text += (
                "one block, since no layers repeat: all of it is gathered at once. Name layers with "
                f"{self.name}(blocks=[...]) to save memory"
            )
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        if not meta and size > 1e8:
            text += f"; every rank built all {gb(size)} of it first, build it in configure_model to avoid that"
        if not self.sync_every_micro_batch:
            trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
            text += f"; every rank keeps all {gb(trained)} of gradients within a window of several micro-batches"
        return text

    def wrap(self) -> None:
        """Refuse gradients of which `place` knows nothing; what is trainable is looked up at each step."""
        self.unwrap()
        if self.sharded and self.module is not None:
            self._refusals = refuse_stray_gradients(self.module, self.name)

    def unwrap(self) -> None:
        """Take back the refusals of `wrap`."""
        while self._refusals:
            self._refusals.pop().remove()

    def training_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step` inside the root's forward, which gathers what the blocks do not."""
        return self._rooted(self._in_precision(step))

    def scale(self, loss: Tensor) -> Tensor:
        """As the base class does; ConfigurationError for a loss of shards."""
        refuse_shards_in(loss, self.name)
        return super().scale(loss)

    def evaluation_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """As in training; afterwards all parameters are shards again, since no backward pass makes them so."""
        if not self.sharded:
            return super().evaluation_step(step)
        inner = self._rooted(self._in_precision(step))

        def run(*args: Any) -> Any:
            output = inner(*args)
            sharding.reshard(self._roots)
            return output

        return run

    def _in_precision(self, step: Callable[..., Any]) -> Callable[..., Any]:
        if self.sharded and self.precision.autocast is not None and not self.autocast:
            return step
        return super()._in_precision(step)

    def sync_buffers(self) -> None:
        """Buffers are whole on every rank: all get those of rank 0."""
        if self.sharded and self.module is not None:
            for buffer in self.module.buffers():
                dist.broadcast(buffer, 0)

    def _rooted(self, step: Callable[..., Any]) -> Callable[..., Any]:
        if not self.sharded:
            return step
        if not isinstance(root := self._roots[0], Steps):
            return with_reasons(step, self.name)
        running = [
            buffer
            for part in root.modules()
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats
            for buffer in part.buffers(recurse=False)
        ]

        def run(*args: Any) -> Any:
            for buffer in running:  # as DDP does: all ranks go on from rank 0's statistics
                dist.broadcast(buffer, 0)
            return root(step, *args)

        return with_reasons(run, self.name)

    # --- gradients and steps -------------------------------------------------------------------------------------
    def sync_gradients(self, enabled: bool) -> None:
        """Keep gradients back within a window, where `sync_every_micro_batch=False` asked for it."""
        if self.sync_every_micro_batch or not self.sharded:
            return
        self._unreduced = not enabled
        for root in self._roots:
            for part in sharding.fsdp_modules(root):
                part.set_requires_gradient_sync(enabled, recurse=False)

    def drop_window(self) -> None:
        """Forget the gradients of a window that is given up."""
        if self._unreduced:
            sharding.forget_unreduced(self._roots)
        super().drop_window()

    def trainable_changed(self) -> None:
        """Free what is gathered: a gathered parameter needs gradients if its shard did when it was gathered."""
        if self.sharded:
            sharding.reshard(self._roots)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing: each backward pass of a sharded module ends with the gradients reduced."""

    @torch.no_grad()
    def clip_gradients(self, parameters: list[nn.Parameter], value: float, algorithm: str = "norm") -> Tensor | None:
        """Clip shards by the norm of the whole gradients, or each by value."""
        if not self.sharded:
            return super().clip_gradients(parameters, value, algorithm)
        grads = [p.grad for p in parameters if p.grad is not None]
        if algorithm == "value":
            parts = [sharding.local(grad) for grad in grads]
            torch._foreach_clamp_min_(parts, -value)
            torch._foreach_clamp_max_(parts, value)
            return None
        norm = sharding.whole(nn.utils.get_total_norm(grads))
        nn.utils.clip_grads_with_norm_(parameters, value, norm)
        return norm

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> bool:
        """As the base class does; ConfigurationError for an optimizer whose operations torch cannot do on shards, and
        where ranks trained other parameters than others."""
        if self.sharded and self.module is not None:
            self._same_use.check(optimizer, self.module, self)
        if closure is not None:
            return super().optimizer_step(optimizer, closure, **kwargs)
        with self._refusals_of_shards(optimizer):
            return super().optimizer_step(optimizer, **kwargs)

    @contextmanager
    def _refusals_of_shards(self, optimizer: Optimizer) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not any(word in str(error) for word in ("DTensor", "harding")):
                raise
            reason = str(error).partition("\n")[0]
            fused = any(group.get("fused") for group in optimizer.param_groups)
            raise ConfigurationError(
                f"{type(optimizer).__name__} cannot be used with {self.name}: its step does on shards what torch "
                f"cannot do there ({reason}). Use {'it without fused=True' if fused else 'AdamW, Adam or SGD'}, or "
                "strategy='ddp'."
            ) from error

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse what cannot work on shards; ConfigurationError."""
        if not self.sharded:
            return
        assert self.module is not None
        kind = type(optimizer).__name__
        if isinstance(optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
            raise ConfigurationError(
                f"{kind} cannot be used with {self.name}: its state is no tensor of a parameter's shape, so it cannot "
                "be sharded. Use Adam, AdamW or SGD, or strategy='ddp'."
            )
        known = {id(p) for p in self.module.parameters()}
        if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
            raise ConfigurationError(
                f"{kind} holds parameters that the module no longer has: {self.name} replaced them by shards. Make the "
                "optimizer in configure_optimizers, from self.parameters()."
            )
        if self.cpu_offload and any(group.get("fused") for group in optimizer.param_groups):
            raise ConfigurationError(f"cpu_offload=True keeps shards in host memory. Use {kind} without fused=True.")
        if type(optimizer).__module__.startswith("torch.optim"):  # those of others may refer to their parameters
            with self._refusals_of_shards(optimizer):
                _try_step(optimizer)


def _try_step(optimizer: Optimizer) -> None:
    """One step of a copy of `optimizer`, on a small sharded matrix of zeros."""
    from torch.distributed.tensor import DTensor

    found = [(group, p) for group in optimizer.param_groups for p in group["params"] if isinstance(p, DTensor)]
    if not found:
        return
    group, like = found[0]
    zeros = torch.zeros(2, 2, dtype=like.dtype, device=like.device)
    matrix = nn.Parameter(DTensor.from_local(zeros, like.device_mesh, like.placements))
    matrix.grad = torch.zeros_like(matrix)
    trial = copy.copy(optimizer)
    made = optimizer.state.get(like, {})  # by its constructor, as Adagrad's is in torch 2.11
    state = {k: torch.zeros_like(matrix) if isinstance(v, DTensor) else copy.deepcopy(v) for k, v in made.items()}
    trial.state = defaultdict(dict, {matrix: state})
    trial.param_groups = [{**group, "params": [matrix]}]
    type(optimizer).step(trial)  # what schedulers put around `optimizer.step` would count it
