"""Which parameters of a model ``fully_shard`` gathers together, and how long they stay gathered."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from sharding.blocks import ends_of_language_model, units_by_last_block
from sharding.mesh import ParallelMesh
from sharding.slice_collectives import use_slice_exchange


class ModelSharder:
    """Shards a model block by block, and then the rest of it.

    What is used last in a forward pass is used first in the backward pass that follows, and is not freed in between:
    the last block, the final norm and the output projection, and what is left for the model itself. An embedding that
    is not the projection too is needed for a moment at the start alone, and its gradient comes last.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        mesh: ParallelMesh,
        *,
        frees_blocks: bool,
        dtype: torch.dtype,
    ) -> None:
        """Look at a model whose parameters need no memory yet.

        Args:
            model: the model.
            blocks: its blocks, in forward order.
            mesh: a mesh with a device mesh.
            frees_blocks: whether parameters are freed after a block's forward pass, and gathered anew for backward.
            dtype: format of the gathered parameters and of computation; gradients are reduced in fp32.
        """
        self._model = model
        self._blocks = blocks
        self._mesh = mesh
        self._frees_blocks = frees_blocks
        self._policy = MixedPrecisionPolicy(
            param_dtype=None if dtype is torch.float32 else dtype,
            reduce_dtype=torch.float32,
            # Those of the model alone are cast, by ``sharding.precision``, as under every strategy.
            cast_forward_inputs=False,
        )
        self._units = units_by_last_block(model, blocks)

    def shard_block(self, block: nn.Module) -> None:
        """Shard a block, or all that it shares parameters with once it is the last of them; in the order of blocks."""
        if unit := self._units.get(id(block)):
            self._shard(unit, frees=self._frees_blocks and block is not self._blocks[-1])

    def shard_rest(self) -> None:
        """Shard what is in no block."""
        embedding, last = ends_of_language_model(self._model, self._blocks)
        if embedding is not None:
            for module in self._shard([embedding], frees=self._frees_blocks):
                # Its gradient goes to the rows that were looked up, whatever they hold.
                module.set_unshard_in_backward(unshard_in_backward=False)
        if last:
            self._shard(last, frees=False)
        # None is torch's own rule for the outermost module, which never frees after forward.
        self._shard([self._model], frees=None)

    def _shard(self, modules: list[nn.Module], *, frees: bool | None) -> list[FSDPModule]:
        fully_shard(
            modules[0] if len(modules) == 1 else modules,
            mesh=self._mesh.sharding_mesh,
            reshard_after_forward=frees,
            mp_policy=self._policy,
        )
        sharded: list[FSDPModule] = [module for module in modules if isinstance(module, FSDPModule)]
        for module in sharded:
            use_slice_exchange(module, self._mesh.shard_group)
        return sharded
