"""What a rank must hold under each strategy, from the sizes of a model alone: pure arithmetic, no GPU, no ranks.

`measure` counts a model's parameters (the meta device will do), `estimate` says what one rank holds of weights,
gradients and optimizer states, and `pick` chooses. Activations depend on the data and are not counted: a share of the
memory is left to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .blocks import find_blocks, without_shared
from .precision import Precision

#: The share of a device's memory that states may take; the rest is for activations and what the allocator wastes.
STATES_SHARE = 0.7
_BUCKET_BYTES = 2 * 25 * 2**20  # of DistributedDataParallel: one that fills, one that travels
STRATEGY_NAMES = ("single", "ddp", "fsdp", "hsdp")


@dataclass(frozen=True)
class Sizes:
    """Numbers (not bytes) in a model: all, those that are trained, the largest block, what is in no block."""

    parameters: int
    trainable: int
    largest_block: int
    outside_blocks: int


@dataclass(frozen=True)
class Estimate:
    """Bytes that one rank of `strategy` holds; `copies`: low-precision copies, gathered layers and buckets."""

    strategy: str
    shards: int
    weights: int
    gradients: int
    optimizer: int
    copies: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.copies


def measure(model: nn.Module) -> Sizes:
    """The sizes of a model, on whichever device."""
    blocks, _ = without_shared(model, find_blocks(model))
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks]
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Sizes(total, trainable, max(in_blocks, default=0), total - sum(in_blocks))


def estimate(
    sizes: Sizes, precision: Precision, strategy: str, devices: int, num_nodes: int = 1, optimizer_states: int = 2
) -> Estimate:
    """What a rank holds with `devices` ranks a node; `optimizer_states` numbers a trained parameter (Adam: 2)."""
    shards = {"fsdp": devices * num_nodes, "hsdp": devices}.get(strategy, 1)
    width = precision.parameters.itemsize if precision.parameters is not None else 4
    computed = precision.autocast.itemsize if precision.autocast is not None else width

    def share(numbers: int, item_bytes: int) -> int:
        return -(-numbers // shards) * item_bytes

    if shards > 1:
        # the root's layers stay gathered, one block is in use and the next on its way; a block's gradients are whole
        gathered = (sizes.outside_blocks + 2 * sizes.largest_block) * computed
        copies = gathered + (sizes.largest_block + sizes.outside_blocks) * width
    else:
        copies = sizes.parameters * computed if precision.autocast is not None else 0
        copies += _BUCKET_BYTES if strategy == "ddp" and devices * num_nodes > 1 else 0
    return Estimate(
        strategy,
        shards,
        weights=share(sizes.parameters, width),
        gradients=share(sizes.trainable, width),
        optimizer=share(sizes.trainable, width) * optimizer_states,
        copies=copies,
    )


def pick(sizes: Sizes, precision: Precision, devices: int, num_nodes: int, memory_bytes: int) -> tuple[str, str]:
    """(strategy, reason): the one that communicates least of those whose states fit in `memory_bytes` a rank."""
    room = int(memory_bytes * STATES_SHARE)
    tried: list[Estimate] = []
    for name in candidates(devices, num_nodes):
        found = estimate(sizes, precision, name, devices, num_nodes)
        if found.total <= room:
            said = "".join(f", {other.strategy} would need {gb(other.total)}" for other in tried)
            return (
                name,
                f"auto: states of {gb(found.total)} a rank fit in {STATES_SHARE:.0%} of {gb(memory_bytes)}{said}",
            )
        tried.append(found)
    last = tried[-1]
    return last.strategy, (
        f"auto: states of {gb(last.total)} a rank are more than {STATES_SHARE:.0%} of {gb(memory_bytes)} under any "
        "strategy; use more ranks, FSDP(cpu_offload=True) or precision='bf16-true'"
    )


def candidates(devices: int, num_nodes: int) -> Iterator[str]:
    """The strategies to consider, the one that communicates least first."""
    if devices * num_nodes == 1:
        yield "single"
        return
    yield "ddp"
    if num_nodes > 1 and devices > 1:
        yield "hsdp"
    yield "fsdp"


def table(sizes: Sizes, precision: Precision, devices: int, num_nodes: int, memory_bytes: int | None) -> str:
    """Every strategy's estimate, as lines of text."""
    lines = [
        f"{sizes.parameters:,} parameters, {sizes.trainable:,} of them trained; precision {precision.name}",
        f"{num_nodes} node(s) of {devices} device(s); Adam's two states; activations are not counted",
        f"{'strategy':<10}{'shards':>8}{'weights':>11}{'gradients':>11}{'optimizer':>11}{'copies':>11}{'a rank':>11}",
    ]
    names = STRATEGY_NAMES if devices * num_nodes > 1 else ("single",)
    for name in names:
        ranks = (1, 1) if name == "single" else (devices, num_nodes)
        found = estimate(sizes, precision, name, *ranks)
        held = (found.weights, found.gradients, found.optimizer, found.copies, found.total)
        lines.append(f"{name:<10}{found.shards:>8}" + "".join(f"{gb(number):>11}" for number in held))
    if memory_bytes is not None:
        name, reason = pick(sizes, precision, devices, num_nodes, memory_bytes)
        lines.append(f"strategy='auto' takes {name} ({reason.removeprefix('auto: ')})")
    return "\n".join(lines)


def gb(number: int) -> str:
    """Bytes for people, in powers of ten."""
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
