"""`Strategy`: where tensors live and how ranks talk. The base class is the whole contract, for one process.

A strategy connects the ranks, places the module, decides when gradients are synchronised within a window, and owns
the norm for clipping, the optimizer's step and the collectives. It never sees a path, a logger or the trainer.
Subclasses override few methods; `register_strategy` gives one a name for `Trainer(strategy="name")`.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigurationError, LaunchError, PacelineError
from .channel import Channel
from .cluster import Cluster, rendezvous_environment
from .precision import Precision, parse_precision

STRATEGIES: dict[str, Callable[[], Strategy]] = {}
_S = TypeVar("_S", bound="type[Strategy]")
_T = TypeVar("_T")
_Step = Callable[..., Any]
_SECONDS_TO_LET_GO = 0.2


def register_strategy(name: str, **options: Any) -> Callable[[_S], _S]:
    """Class decorator: `Trainer(strategy=name)` builds the class with `options`."""

    def register(strategy: _S) -> _S:
        STRATEGIES[name] = lambda: strategy(**options)
        return strategy

    return register


class Strategy:
    """One process on one device, and the defaults from which others start.

    `rank`, `local_rank`, `node_rank`, `world_size` place this process in the job; `data_rank` of `data_ranks` says
    which share of the data it reads (equal to rank and world size unless some ranks share a batch).
    """

    #: True where the forward pass of evaluation communicates, so that all ranks must run equally many.
    evaluation_communicates = False
    #: True where parameters are split over ranks.
    sharded = False
    #: True where more than one process may take part.
    distributed = False
    #: True: BatchNorm layers are replaced by ones whose statistics are those of all ranks.
    sync_batchnorm = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.rank = self.local_rank = self.node_rank = 0
        self.world_size = self.local_world_size = 1
        self.precision: Precision = parse_precision("32-true")
        self.scaler: torch.amp.GradScaler | None = None
        self.module: nn.Module | None = None
        #: Parameters and buffers, by name, that get their values from files right after `place`.
        self.filled_later: set[str] = set()
        self._channels: dict[str, Channel] = {}

    @property
    def name(self) -> str:
        """The name that messages use."""
        return type(self).__name__

    # --- ranks -------------------------------------------------------------------------------------------------
    @property
    def data_rank(self) -> int:
        """Which of the `data_ranks` shares of every global batch this process reads."""
        return self.rank

    @property
    def data_ranks(self) -> int:
        """Into how many shares a global batch is cut."""
        return self.world_size

    @property
    def gradient_divisor(self) -> int:
        """By what the sum of all ranks' gradients is divided: `data_ranks` where they are averaged, 1 where summed.

        The losses of a window are scaled by their share of its weight times this number.
        """
        return self.data_ranks

    @property
    def root_device(self) -> torch.device:
        """Lightning's name for `device`."""
        return self.device

    @property
    def global_rank(self) -> int:
        """Lightning's name for `rank`."""
        return self.rank

    @property
    def is_global_zero(self) -> bool:
        """True on the one process that prints, draws and writes."""
        return self.rank == 0

    def take_place(self, device: torch.device, cluster: Cluster | None) -> None:
        """Know this process's device and its place in the job; nothing is set up yet."""
        self.device = device
        if cluster is not None:
            self.rank, self.world_size = cluster.rank, cluster.world_size
            self.local_rank, self.local_world_size = cluster.local_rank, cluster.local_world_size
            self.node_rank = cluster.node_rank

    def connect(self, cluster: Cluster | None) -> None:
        """Use the device and, in a job of several processes, join the others."""
        if self.device.type != "cpu" and self.device.index is not None:
            torch.accelerator.set_device_index(self.device.index)
        if cluster is not None and self.world_size > 1:
            _join(self.device, cluster)

    def disconnect(self) -> None:
        """Leave the job; a later `connect` may join another."""
        self._channels.clear()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    # --- the module --------------------------------------------------------------------------------------------
    def building(self) -> AbstractContextManager[Any]:
        """The context in which `configure_model` builds layers: on the meta device where they will be sharded."""
        return nullcontext()

    def place(self, module: nn.Module, precision: Precision) -> None:
        """Move the module to its device and type; evaluation uses it as it is afterwards."""
        self.module, self.precision = module, precision
        self.scaler = torch.amp.GradScaler(self.device.type) if precision.scaled else None
        module.to(device=self.device, dtype=precision.parameters)

    def wrap(self) -> None:
        """Make the placed module ready for training; called once the optimizers exist, and again when frozen
        parameters were thawed."""

    def unwrap(self) -> None:
        """Give back what `wrap` holds; the placed module stays where it is."""

    def training_step(self, step: _Step) -> _Step:
        """`step` as training must call it: under autocast, through a wrapper that reduces gradients, ..."""
        return self._in_precision(step)

    def evaluation_step(self, step: _Step) -> _Step:
        """`step` as evaluation must call it."""
        return self._in_precision(step)

    def _in_precision(self, step: _Step) -> _Step:
        if self.precision.autocast is None and self.precision.parameters is None:
            return step

        def step_in_precision(*args: Any) -> Any:
            with self.precision.forward_context(self.device.type):
                return step(*args)

        return step_in_precision

    def batch_to_device(self, batch: Any, move: Callable[..., Any]) -> Any:
        """`batch` on this rank's device and, under "*-true", its floats in the weights' type."""
        return move(batch, self.device, self.precision.parameters)

    # --- gradients and steps -----------------------------------------------------------------------------------
    def sync_gradients(self, enabled: bool) -> None:
        """Whether the next backward pass ends with gradients reduced over the ranks; one a window does."""

    def drop_window(self) -> None:
        """Forget the gradients of a window that is given up before its last micro-batch."""
        self.sync_gradients(True)

    def idle_backward(self) -> None:
        """Take part in the window's reduction with gradients of zero; called where a rank has no loss."""
        zero_loss(self.module).backward()

    def sync_buffers(self) -> None:
        """Give every rank the buffers of which a checkpoint holds one copy; before evaluation inside `fit`."""

    def trainable_changed(self) -> None:
        """Which parameters need gradients was changed between two forward passes of one step; manual optimization."""

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average `.grad` over the ranks in one flat all-reduce; for manual optimization."""

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that cannot work on the placed parameters; ConfigurationError."""

    def scale(self, loss: Tensor) -> Tensor:
        """The loss from which to go backward: scaled under "16-mixed"."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Gradients as they are, before anyone looks at them or clips them."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def clip_gradients(self, parameters: list[nn.Parameter], value: float, algorithm: str = "norm") -> Tensor | None:
        """Clip in place, by the total 2-norm or by value; returns the norm before clipping, a 0-d device tensor."""
        if algorithm == "value":
            nn.utils.clip_grad_value_(parameters, value)
            return None
        return nn.utils.clip_grad_norm_(parameters, value)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> bool:
        """Step; False when the fp16 scaler skipped it because gradients overflowed (one host read, torch's own)."""
        if self.scaler is None:
            if closure is None:
                optimizer.step(**kwargs)
            else:
                optimizer.step(closure, **kwargs)
            return True
        stepped = False

        def note(*_: Any) -> None:
            nonlocal stepped
            stepped = True

        handle = optimizer.register_step_post_hook(note)
        try:
            if closure is not None:
                closure()
            self.scaler.step(optimizer, **kwargs)
        finally:
            handle.remove()
        self.scaler.update()
        return stepped

    # --- state -------------------------------------------------------------------------------------------------
    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers of the placed module by name, as `state_dict` names them."""
        assert self.module is not None
        yield from self.module.state_dict(keep_vars=True).items()

    # --- collectives: every rank calls them, in the same order ---------------------------------------------------
    def channel(self, name: str) -> Channel:
        """The channel `name` for small asynchronous messages; the first call is a collective."""
        if name not in self._channels:
            self._channels[name] = Channel(self.world_size)
        return self._channels[name]

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks; `name` is for the reader."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The `obj` of rank `src` on every rank: a tensor in place, anything else as `broadcast_object` does it."""
        if not isinstance(obj, Tensor):
            return self.broadcast_object(obj, src)
        if self.world_size > 1:
            dist.broadcast(obj, src)
        return obj

    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: str | None = "mean") -> Tensor:
        """A copy of `tensor` reduced over all ranks, on every rank; Lightning's name for `all_reduce`."""
        return self.all_reduce(tensor.clone(), {"avg": "mean", None: "sum"}.get(reduce_op, str(reduce_op)))

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """`tensor` reduced over the ranks in place; `op` is "sum", "mean", "min" or "max"."""
        if self.world_size > 1:
            named = {
                "sum": dist.ReduceOp.SUM,
                "mean": dist.ReduceOp.SUM,
                "min": dist.ReduceOp.MIN,
                "max": dist.ReduceOp.MAX,
            }
            dist.all_reduce(tensor, named[op])
            if op == "mean":
                tensor /= self.world_size
        return tensor

    def all_gather(self, tensor: Tensor, sync_grads: bool = False) -> Tensor:
        """Equal shapes of all ranks stacked: (world_size, *shape); on one rank the tensor itself.

        With `sync_grads` the result is differentiable: each rank's gradient is the sum over all ranks' results.
        """
        if self.world_size == 1:
            return tensor
        if sync_grads:
            gathered: Tensor = _AllGather.apply(self, tensor)  # type: ignore[no-untyped-call]
            return gathered
        rows = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(rows, tensor.detach().contiguous())
        return torch.stack(rows)

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """The picklable object of rank `src` on every rank; a host-side message between trusted ranks."""
        if self.world_size == 1:
            return obj
        held = [obj]
        dist.broadcast_object_list(held, src)
        return held[0]

    def from_rank_zero(self, work: Callable[[], _T]) -> _T:
        """What `work` returns on rank 0, on every rank; a PacelineError or OSError of it is raised on all."""
        outcome: Any = None
        if self.is_global_zero:
            try:
                outcome = work()
            except (PacelineError, OSError) as error:
                outcome = error
        outcome = self.broadcast_object(outcome)
        if isinstance(outcome, PacelineError | OSError):
            raise outcome
        result: _T = outcome
        return result

    def all_gather_object(self, obj: Any) -> list[Any]:
        """The picklable objects of all ranks, by rank."""
        if self.world_size == 1:
            return [obj]
        held: list[Any] = [None] * self.world_size
        dist.all_gather_object(held, obj)
        return held


class _AllGather(torch.autograd.Function):
    """`all_gather` whose gradient is the sum of all ranks' gradients of this rank's row."""

    @staticmethod
    def forward(ctx: Any, strategy: Strategy, tensor: Tensor) -> Tensor:
        ctx.strategy = strategy
        return strategy.all_gather(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        strategy: Strategy = ctx.strategy
        return None, strategy.all_reduce(gradients[0].clone())[strategy.rank]


def zero_loss(module: nn.Module | None) -> Tensor:
    """0 as a function of every trainable parameter: its backward takes part in a reduction and adds nothing."""
    assert module is not None
    return torch.stack([p.sum() * 0 for p in module.parameters() if p.requires_grad]).sum()


def _let_threads_go() -> None:
    """Before the interpreter ends: gloo's threads let go of a collective's tensors a moment after it, for which they
    take the interpreter's lock, and in an interpreter that is being taken down that aborts the process."""
    time.sleep(_SECONDS_TO_LET_GO)


def _join(device: torch.device, cluster: Cluster) -> None:
    atexit.unregister(_let_threads_go)  # once, however many trainers there are
    atexit.register(_let_threads_go)
    if dist.is_initialized():
        if dist.get_world_size() != cluster.world_size:
            raise ConfigurationError(
                f"torch.distributed already runs with {dist.get_world_size()} ranks, the environment says "
                f"{cluster.world_size}. Leave init_process_group to the Trainer, or give it the same ranks."
            )
        return
    os.environ.update(rendezvous_environment(cluster))
    backend = (
        "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    )
    try:
        if cluster.store is None:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=cluster.store, rank=cluster.rank, world_size=cluster.world_size)
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {cluster.rank} of {cluster.world_size} (found by {cluster.found_by}) could not join the others at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {error}. Are all ranks started, and "
            "are MASTER_ADDR and MASTER_PORT those of rank 0's host?"
        ) from error
