"""Which ranks shard state together and which hold replicas of it."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sharding.config import ParallelConfig
from sharding.ranks.process_group import Ranks

REPLICATE_AXIS = "replicate"
SHARD_AXIS = "shard"


@dataclass(frozen=True)
class DataParallelMesh:
    """The ranks as data parallelism sees them.

    Attributes:
        device_mesh: 1-D ``(shard,)``, or 2-D ``(replicate, shard)`` under hsdp; None where one rank has no peers to
            talk to (strategy ``none``).
        dp_rank: this rank's place among the ranks that read different data.
        dp_degree: number of those ranks.
        shard_group: the ranks over which a sharded parameter is divided; None without a mesh.
        is_first_replica: whether this rank holds the copy of its shards that is written to checkpoints.
    """

    device_mesh: DeviceMesh | None
    dp_rank: int
    dp_degree: int
    shard_group: dist.ProcessGroup | None
    is_first_replica: bool

    def writes_copy(self, index: int = 0) -> bool:
        """Whether this rank writes the index-th of the tensors of which every rank has a copy.

        Buffers, replicated parameters, counts of steps, the loss scale: of each one rank alone, and of many each rank
        about as many as the others.
        """
        return index % self.dp_degree == self.dp_rank


def build_mesh(parallel: ParallelConfig, ranks: Ranks) -> DataParallelMesh:
    """Arrange all ranks for ``parallel.strategy``; the process group must be up.

    Under hsdp neighbouring ranks shard together, since they most likely share a node.
    """
    if parallel.strategy == "none":
        return DataParallelMesh(None, ranks.rank, ranks.world_size, None, is_first_replica=True)
    if parallel.strategy == "hsdp":
        shape: tuple[int, ...] = (parallel.replicate, ranks.world_size // parallel.replicate)
        axes: tuple[str, ...] = (REPLICATE_AXIS, SHARD_AXIS)
    else:
        shape, axes = (ranks.world_size,), (SHARD_AXIS,)
    device_mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=axes)
    is_first_replica = parallel.strategy != "hsdp" or device_mesh.get_local_rank(REPLICATE_AXIS) == 0
    return DataParallelMesh(
        device_mesh, ranks.rank, ranks.world_size, device_mesh.get_group(SHARD_AXIS), is_first_replica
    )
