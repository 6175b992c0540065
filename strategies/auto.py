"""From `Trainer(strategy=, accelerator=, devices=, num_nodes=)` and the environment to one strategy on one device.

`choose` is pure but for asking torch which devices there are; it neither connects nor launches. `"auto"` chooses by the
number of ranks until the model is known; then `by_size` chooses by what a rank must hold.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import ConfigurationError, did_you_mean
from .base import STRATEGIES, Strategy
from .cluster import Cluster
from .estimate import Sizes, pick
from .precision import Precision


@dataclass(frozen=True)
class Choice:
    """What a run will use: `ranks_here` processes on this node, each on its own one of `devices`."""

    strategy: Strategy
    devices: list[torch.device]
    ranks_here: int
    num_nodes: int
    reason: str
    automatic: bool = False

    def device_of(self, local_rank: int) -> torch.device:
        """The device of the rank `local_rank` of this node."""
        return self.devices[local_rank % len(self.devices)]


def choose(
    strategy: str | Strategy,
    accelerator: str,
    devices: int | str | Sequence[int],
    num_nodes: int,
    cluster: Cluster | None,
    can_launch: bool = True,
) -> Choice:
    """Resolve the four arguments; ConfigurationError for what is unknown, contradictory or not there."""
    kind = _accelerator_kind(accelerator)
    available = _device_count(kind)
    indices = _device_indices(devices, kind, available, strategy, cluster, can_launch)
    ranks_here = len(indices)
    if cluster is not None:
        _check_launched(ranks_here, devices, num_nodes, cluster)
        num_nodes = max(num_nodes, cluster.num_nodes)
    world_size = ranks_here * num_nodes
    chosen, reason = _strategy(strategy, world_size)
    if world_size > 1 and not chosen.distributed:
        raise ConfigurationError(
            f"strategy={chosen.name!r} runs in one process, but devices={devices!r} on {num_nodes} node(s) make "
            f"{world_size} ranks. Use strategy='ddp', or devices=1 without a launcher."
        )
    found = [torch.device("cpu")] if kind == "cpu" else [torch.device(kind, index) for index in indices]
    return Choice(chosen, found, ranks_here, num_nodes, reason, automatic=strategy == "auto" and world_size > 1)


def by_size(choice: Choice, sizes: Sizes, precision: Precision, local_rank: int = 0) -> Choice:
    """The choice of `"auto"` for a model of these sizes; any other choice as it is."""
    if not choice.automatic:
        return choice
    memory = memory_of(choice.device_of(local_rank), choice.ranks_here)
    name, reason = pick(sizes, precision, choice.ranks_here, choice.num_nodes, memory)
    return replace(choice, strategy=choice.strategy if name == "ddp" else STRATEGIES[name](), reason=reason)


def memory_of(device: torch.device, ranks_here: int) -> int:
    """Bytes that a rank may use: a GPU's memory, or its share of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks_here
    return 2**63 - 1  # nobody says: as if everything fitted


def _accelerator_kind(accelerator: str) -> str:
    """A torch device type."""
    present = torch.accelerator.current_accelerator(check_available=True)
    if accelerator == "auto":
        return present.type if present is not None else "cpu"
    if accelerator == "cpu":
        return "cpu"
    if accelerator in ("gpu", "cuda", "mps", "xpu", "hpu", "tpu", "npu"):
        if present is None or accelerator not in ("gpu", present.type):
            there = "no accelerator" if present is None else present.type
            raise ConfigurationError(
                f"accelerator={accelerator!r}, but torch finds {there} on this machine. Use accelerator='auto', or "
                "'cpu'."
            )
        return present.type
    near = did_you_mean(accelerator, ["auto", "cpu", "gpu", "cuda", "mps", "xpu"])
    raise ConfigurationError(f"accelerator={accelerator!r} is not known. {near}")


def _device_count(kind: str) -> int | None:
    """How many devices there are; None for the CPU, which any number of ranks may share."""
    return None if kind == "cpu" else torch.accelerator.device_count()


def _device_indices(
    devices: int | str | Sequence[int],
    kind: str,
    available: int | None,
    strategy: str | Strategy,
    cluster: Cluster | None,
    can_launch: bool,
) -> list[int]:
    if isinstance(devices, str) and devices != "auto":
        devices = _parse_devices(devices)
    tasks = cluster.local_world_size if cluster is not None and cluster.found_by != "torchrun" else 0
    if tasks and available == 1 and devices in ("auto", -1, tasks):
        return [0] * tasks  # `srun --gpus-per-task=1` shows each task a device of its own, as number 0
    if devices == "auto" or devices == -1:
        if cluster is not None:
            if available is not None and cluster.local_world_size > available:
                raise ConfigurationError(
                    f"{cluster.found_by} started {cluster.local_world_size} rank(s) on this node, but it has "
                    f"{available} {kind} device(s), one for each. Start {available}, or use accelerator='cpu'."
                )
            return list(range(cluster.local_world_size))
        if devices == "auto" and (strategy == "single" or not can_launch or kind == "mps"):
            return [0]
        return list(range(available or 1))
    if isinstance(devices, int) and not isinstance(devices, bool):
        if devices < 1:
            raise ConfigurationError(f"devices={devices} is too few. Use a number of at least 1, -1 or 'auto'.")
        if available is not None and devices > available:
            raise ConfigurationError(
                f"devices={devices}, but this machine has {available} {kind} device(s). Use devices={available}, or "
                "'auto' for all."
            )
        return list(range(devices))
    if isinstance(devices, (list, tuple)) and devices and all(isinstance(i, int) and i >= 0 for i in devices):
        missing = [i for i in devices if available is not None and i >= available]
        if missing or len(set(devices)) < len(devices):
            raise ConfigurationError(
                f"devices={devices!r}: this machine has {kind} devices 0 to {(available or 1) - 1}, each once."
            )
        return list(devices)
    raise ConfigurationError(f"devices={devices!r} is not understood. Use a number, a list of indices, -1 or 'auto'.")


def _parse_devices(devices: str) -> int | list[int]:
    """ "2" is a number of devices, "0,1" and "1," are indices."""
    try:
        if "," in devices:
            return [int(part) for part in devices.split(",") if part.strip()]
        return int(devices)
    except ValueError:
        raise ConfigurationError(
            f"devices={devices!r} is not understood. Use a number ('2'), indices ('0,1'), '-1' or 'auto'."
        ) from None


def _check_launched(ranks_here: int, devices: object, num_nodes: int, cluster: Cluster) -> None:
    if ranks_here != cluster.local_world_size:
        raise ConfigurationError(
            f"devices={devices!r} asks for {ranks_here} rank(s) a node, but {cluster.found_by} started "
            f"{cluster.local_world_size}. Use devices='auto' or start {ranks_here}."
        )
    if num_nodes not in (1, cluster.num_nodes):
        raise ConfigurationError(
            f"num_nodes={num_nodes}, but {cluster.found_by} started {cluster.num_nodes}. Leave num_nodes out, or start "
            f"{num_nodes}."
        )


def _strategy(strategy: str | Strategy, world_size: int) -> tuple[Strategy, str]:
    if isinstance(strategy, Strategy):
        return strategy, "given"
    if strategy == "auto":
        name = "ddp" if world_size > 1 else "single"
        return STRATEGIES[name](), "one process" if world_size == 1 else "several ranks, the model fits each"
    if strategy not in STRATEGIES:
        near = did_you_mean(str(strategy).lower(), [*STRATEGIES, "auto"])
        raise ConfigurationError(
            f"strategy={strategy!r} is not known. {near} There are 'auto', "
            f"{', '.join(map(repr, STRATEGIES))}, and any Strategy object."
        )
    return STRATEGIES[strategy](), "asked for"
