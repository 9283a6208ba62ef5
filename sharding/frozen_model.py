"""A model that is only run, beside the one that is trained: on ranks by the order of ``build_engine``, in no state."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sharding.batch_norm import synchronize_batch_norm
from sharding.blocks import find_blocks
from sharding.compute_copies import ComputeCopies
from sharding.config import Strategy
from sharding.initialization import (
    InitializeModule,
    Materializer,
    check_parameters,
    initialize_outside_blocks,
    initialize_tree,
)
from sharding.mesh import ParallelMesh
from sharding.part import Part, part_of
from sharding.precision import cast_at_ends
from sharding.recurrent_weights import leave_recurrent_weights_alone
from sharding.sharder import ModelSharder
from sharding.state import MODEL_PREFIX
from sharding.zero import refuse_scalars

_Result = TypeVar("_Result")


class FrozenModel:
    """A model in evaluation mode whose parameters have no gradients, as it lies on ranks."""

    def __init__(self, model: nn.Module, mesh: ParallelMesh, copies: ComputeCopies | None = None) -> None:
        """Take a model whose parameters have memory and lie where they will stay.

        Args:
            model: the model.
            mesh: the ranks.
            copies: what it computes with, where that is not what lies there.
        """
        self._model = model
        self._mesh = mesh
        self._copies = copies
        self._sharded_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def run(self, forward: Callable[[nn.Module], _Result]) -> _Result:
        """What a function makes of the model, without gradients; every rank must call it.

        Args:
            forward: runs the model, once.
        """
        computing = nullcontext() if self._copies is None else self._copies.in_place(has_gradients=False)
        with torch.no_grad(), computing:
            result = forward(self._model)
        for module in self._sharded_modules:
            # No backward pass follows that would free what stays gathered after its forward pass.
            module.reshard()
        return result

    def parts(self) -> list[Part]:
        """This rank's part of each parameter and persistent buffer, named as in canonical state; live."""
        persistent = self._model.state_dict().keys()
        tensors: list[tuple[str, torch.Tensor]] = list(self._model.named_parameters())
        tensors += [(name, buffer) for name, buffer in self._model.named_buffers() if name in persistent]
        return [self._part(f"{MODEL_PREFIX}{name}", tensor, index) for index, (name, tensor) in enumerate(tensors)]

    def _part(self, name: str, tensor: torch.Tensor, index: int) -> Part:
        if isinstance(tensor, DTensor):
            return part_of(name, tensor, self._mesh.shard_holder, sums_over=self._mesh.shard_group)
        return part_of(name, tensor, self._mesh.copy_holder, index)


def build_frozen_model(
    model: nn.Module,
    initialize: InitializeModule,
    mesh: ParallelMesh,
    device: torch.device,
    *,
    strategy: Strategy,
    dtype: torch.dtype,
) -> FrozenModel:
    """Bring a model to life that is only run, with initial values, which whoever builds it writes its own over.

    Block by block: memory, values, sharding. Under ``none`` and ``ddp`` each rank holds it whole; else it is divided
    over the ranks that divide the trained model, whatever backend does that, and each block is whole while it runs.

    Args:
        model: on the meta device.
        initialize: called once per module; of what is in no checkpoint it gives the values that stay.
        mesh: the ranks.
        device: where this rank computes.
        strategy: of the model that is trained.
        dtype: format of parameters and activations in computing.

    Raises:
        UserError: it has parameters without rows, which cannot be divided, or a tensor is left without values.
    """
    is_sharded = strategy not in ("none", "ddp")
    if is_sharded:
        refuse_scalars(model, strategy)
    model.requires_grad_(False).eval()
    blocks = find_blocks(model)
    sharder = ModelSharder(model, [block for _, block in blocks], mesh, frees_blocks=True, dtype=dtype)
    materializer = Materializer(device)
    for name, block in blocks:
        for module in block.modules():
            materializer.materialize(module)
        initialize_tree(block, name, 0, initialize)
        check_parameters(block, name)
        # In evaluation it normalises in fp32 whatever is around it.
        synchronize_batch_norm(block, None, is_compiled=False)
        leave_recurrent_weights_alone(block)
        if is_sharded:
            sharder.shard_block(block)
    initialize_outside_blocks(model, 0, initialize, materializer, [block for _, block in blocks])
    synchronize_batch_norm(model, None, is_compiled=False)
    leave_recurrent_weights_alone(model)
    cast_at_ends(model, dtype)
    if is_sharded:
        sharder.shard_rest()
        return FrozenModel(model, mesh)
    return FrozenModel(model, mesh, None if dtype is torch.float32 else ComputeCopies(model, dtype, is_constant=True))
