"""`HSDP`: sharded inside groups of ranks, such as nodes, and replicated across them.

Layers are gathered within a group, where links are fast; across groups only the gradients of the shards are summed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from .base import register_strategy
from .fsdp import FSDP

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class HSDP(FSDP):
    """`FSDP` over `shard` ranks, `replicate` times; takes FSDP's options.

    By default a node's ranks shard and nodes replicate. Of the two sizes one is enough; their product is the number of
    ranks, and ranks r to r + shard - 1 make up a group.
    """

    def __init__(self, *, shard: int | None = None, replicate: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.shard = shard
        self.replicate = replicate

    def sizes(self) -> tuple[int, int]:
        """(replicate, shard); ConfigurationError where they do not divide the ranks."""
        ranks = self.world_size
        shard = self.shard
        if shard is None:
            shard = ranks // self.replicate if self.replicate else self.local_world_size
        replicate = self.replicate or (ranks // shard if shard else 0)
        if shard < 1 or replicate < 1 or shard * replicate != ranks:
            possible = [n for n in range(1, ranks + 1) if ranks % n == 0]
            raise ConfigurationError(
                f"HSDP(shard={self.shard}, replicate={self.replicate}) cannot divide {ranks} ranks "
                f"({self.local_world_size} on this node). Use a shard of {', '.join(map(str, possible))}."
            )
        return replicate, shard

    def _make_mesh(self) -> DeviceMesh:
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, self.sizes(), mesh_dim_names=("replicate", "shard"))


for _name in ("hsdp", "multi_node"):
    register_strategy(_name)(HSDP)
