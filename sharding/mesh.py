"""The ranks as parallelism arranges them: groups for collectives, and one rank's roles."""

from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sharding.config import ParallelConfig
from sharding.parallel_dims import AXES, ParallelDims, Role, parallel_dims
from sharding.ranks.process_group import Ranks

_SHARDING_AXIS = "shard_context"


@dataclass(frozen=True)
class ParallelMesh:
    """One rank's place in the mesh of all ranks; see ``ParallelDims`` for what each role means.

    Attributes:
        dims: number of ranks along each axis.
        rank: this rank's number among all.
        device_mesh: all ranks by the axes that are needed; None where one rank has no peers to talk to (strategy
            ``none``).
        sharding_mesh: what ``fully_shard`` divides over: 1-D, or 2-D ``(replicate, shard)`` under hsdp; None without a
            mesh. Ranks along ``context`` are part of its shard axis.
        shard_group: the ranks over which a sharded parameter is divided; None without a mesh.
        reduction_group: the ranks whose gradients of one parameter add up; None for all ranks.
        replica_group: the ranks that hold the same shards under hsdp; None elsewhere.
    """

    dims: ParallelDims
    rank: int
    device_mesh: DeviceMesh | None = None
    sharding_mesh: DeviceMesh | None = None
    shard_group: dist.ProcessGroup | None = None
    reduction_group: dist.ProcessGroup | None = None
    replica_group: dist.ProcessGroup | None = None

    @cached_property
    def data(self) -> Role:
        """Place among the ranks that read different data."""
        return self.dims.data(self.rank)

    @cached_property
    def sharding(self) -> Role:
        """Place among the ranks over which a strategy divides the state."""
        return self.dims.sharding(self.rank)

    @cached_property
    def reduction(self) -> Role:
        """Place among the ranks whose gradients of one parameter add up."""
        return self.dims.reduction(self.rank)

    @cached_property
    def counts_loss(self) -> bool:
        """Whether the loss that this rank computes counts."""
        return self.dims.counts_loss(self.rank)

    @cached_property
    def counts_targets(self) -> bool:
        """Whether the targets of the sequences that this rank reads count."""
        return self.dims.counts_targets(self.rank)

    @cached_property
    def copy_holder(self) -> Role:
        """Place among the ranks that have the same part of the model, and so the same of what no strategy divides."""
        return self.dims.holder(self.rank, ("pipeline", "tensor"))

    @cached_property
    def shard_holder(self) -> Role:
        """Place among the ranks that hold the same shards."""
        return self.dims.holder(self.rank, ("pipeline", "tensor", "shard", "context"))

    @cached_property
    def scalar_holder(self) -> Role:
        """Place among the ranks that hold the same number of the whole run, as the loss scale: all of them."""
        return self.dims.holder(self.rank)


def build_mesh(parallel: ParallelConfig, ranks: Ranks) -> ParallelMesh:
    """Arrange all ranks as the settings say; the process group must be up.

    Under hsdp neighbouring ranks shard together, since they most likely share a node.

    Raises:
        UserError: the degrees do not divide the number of ranks.
    """
    dims = parallel_dims(parallel, ranks.world_size)
    if parallel.strategy == "none":
        return ParallelMesh(dims, ranks.rank)
    is_needed = {"shard": True, "replicate": parallel.strategy == "hsdp"}
    axes = [axis for axis in AXES if is_needed.get(axis, False) or dims.size(axis) > 1]
    shape = tuple(dims.size(axis) for axis in axes)
    device_mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=tuple(axes))
    sharding_mesh = _sharding_mesh(device_mesh, dims)
    shard_group = sharding_mesh.get_group(sharding_mesh.ndim - 1)
    if sharding_mesh.ndim == 1:
        reduction_group: dist.ProcessGroup | None = shard_group
    elif sharding_mesh.size() == ranks.world_size:
        reduction_group = None
    else:
        reduction_group = sharding_mesh._flatten("reduction").get_group()
    replica_group = sharding_mesh.get_group(0) if sharding_mesh.ndim > 1 else None
    return ParallelMesh(dims, ranks.rank, device_mesh, sharding_mesh, shard_group, reduction_group, replica_group)


def _sharding_mesh(device_mesh: DeviceMesh, dims: ParallelDims) -> DeviceMesh:
    axes = device_mesh.mesh_dim_names or ()
    if set(axes) <= {"replicate", "shard"}:
        return device_mesh
    shard_axis = "shard"
    if dims.context > 1:
        shard_axis = _SHARDING_AXIS
        device_mesh["shard", "context"]._flatten(shard_axis)
    return device_mesh["replicate", shard_axis] if "replicate" in axes else device_mesh[shard_axis]
