"""ZeRO stages 1 to 3 and HSDP as settings of one mechanism, torch's ``fully_shard``.

Stage 1 keeps gradients whole during accumulation and shards optimizer state (and, between steps, parameters); stage 2
reduce-scatters the gradients of every micro-batch; stage 3 also frees parameters after each block's forward pass; hsdp
is stage 3 inside groups of ranks, with an all-reduce across groups on the last micro-batch. Stages as in Rajbhandari et
al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from sharding.blocks import units_by_last_block
from sharding.config import Strategy
from sharding.engine import Batch, Engine, ModelDefinition, OptimizerFactory
from sharding.engine_builder import EngineBuilder, EngineParts
from sharding.gradient_leaves import gradient_leaves
from sharding.loss_scaler import LossScaler
from sharding.mesh import ParallelMesh
from sharding.part import Part
from sharding.pass_agreement import compare_passes
from sharding.ranks.errors import UserError
from sharding.reached import ReachedParameters
from sharding.torch_engine import TorchEngine

REDUCES_UNUSED_PARAMETERS = hasattr(FSDPModule, "set_reduce_scatter_unused_params")
"""Whether ``fully_shard`` can reduce gradients of parameters that only some ranks use; torch 2.11 cannot."""


def shard_modules(modules: Sequence[nn.Module], mesh: ParallelMesh, strategy: Strategy, dtype: torch.dtype) -> None:
    """Shard the parameters of modules over the mesh, in place.

    Args:
        modules: a block, blocks that share parameters, or the model once its blocks are sharded; gathered together from
            the first that runs to the last.
        mesh: a mesh with a device mesh.
        strategy: one of the zero stages or hsdp.
        dtype: format of the gathered parameters and of computation; gradients are reduced in fp32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype is torch.float32 else dtype,
        reduce_dtype=torch.float32,
    )
    fully_shard(
        modules[0] if len(modules) == 1 else list(modules),
        mesh=mesh.sharding_mesh,
        reshard_after_forward=strategy in ("zero3", "hsdp"),
        mp_policy=policy,
    )


def refuse_scalars(model: nn.Module, strategy: Strategy) -> None:
    """Refuse a model that has parameters without rows.

    Raises:
        UserError: it has.
    """
    scalar = next((name for name, parameter in model.named_parameters() if parameter.ndim == 0), None)
    if scalar is not None:
        raise UserError(
            f"parallel.strategy={strategy} divides parameters by rows, but {scalar} of {type(model).__name__} is a "
            "scalar; give it the shape [1], or use parallel.strategy=ddp or parallel.backend=bucketed."
        )


class ZeroEngine(TorchEngine):
    """A model sharded by ``shard_modules``."""

    def __init__(
        self,
        definition: ModelDefinition,
        mesh: ParallelMesh,
        device: torch.device,
        strategy: Strategy,
        build_optimizer: OptimizerFactory,
        loss_scaler: LossScaler | None = None,
    ) -> None:
        """See TorchEngine; every block and then the model must have been sharded."""
        super().__init__(definition, mesh, device, None, build_optimizer, loss_scaler)
        self._strategy = strategy
        self._sharded_modules = [m for m in self._model.modules() if isinstance(m, FSDPModule)]
        for module in self._sharded_modules:
            # Sum and not average, since the loss carries the global denominator; both calls are needed because a divide
            # factor of 1 alone selects a pre-multiplied sum, which gloo does not have.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # What the loss does not depend on, on this rank, contributes zeros, or ranks would add up runs of memory
            # that hold other parameters.
            if REDUCES_UNUSED_PARAMETERS:
                module.set_reduce_scatter_unused_params(True, recurse=False)
        self._keeps_parameters = strategy in ("zero1", "zero2")
        leaves = gradient_leaves(self._model)
        self._reached = ReachedParameters(
            [leaves[entry.name] for entry in self._trainable],
            mesh.reduction_group,
            must_be_alike=not REDUCES_UNUSED_PARAMETERS,
        )

    def replicas(self) -> list[Part]:
        """See Engine; whole parameters are there only while they are used, gathered anew from one rank's each."""
        return [self._part(*named) for named in self.named_parameters()] if self._strategy == "hsdp" else []

    def _evaluate_batch(self, batch: Batch) -> torch.Tensor:
        sums = super()._evaluate_batch(batch)
        if self._keeps_parameters:
            # No backward pass follows that would free the gathered parameters, and named_parameters() would show
            # them instead of the shards.
            for module in self._sharded_modules:
                module.reshard()
        return sums

    def _accumulation_context(self, *, is_last: bool) -> AbstractContextManager[Any]:
        for module in self._sharded_modules:
            if self._strategy == "zero1":
                module.set_requires_gradient_sync(is_last, recurse=False)
            if self._strategy == "hsdp":
                module.set_requires_all_reduce(is_last, recurse=False)
            if self._keeps_parameters:
                module.set_reshard_after_backward(is_last, recurse=False)
            module.set_is_last_backward(is_last)
        return nullcontext()


class FullyShardBuilder(EngineBuilder):
    """Builds zero1 to zero3 and hsdp of torch: each block is sharded by itself, and then the model."""

    def __init__(self, parts: EngineParts) -> None:
        """Look at the model.

        Raises:
            UserError: it has parameters without rows.
        """
        refuse_scalars(parts.definition.model, parts.parallel.strategy)
        super().__init__(parts)
        self._units = units_by_last_block(parts.definition.model, [block for _, block in parts.blocks])

    def prepare_block(self, name: str, block: nn.Module) -> None:
        """See EngineBuilder; blocks that share parameters are sharded together, after the last of them."""
        if unit := self._units.get(id(block)):
            self._shard(unit)

    def finish(self, model: nn.Module) -> Engine:
        """See EngineBuilder."""
        self._shard([model])
        parts = self._parts
        definition = compare_passes(parts, parts.blocks, compares_parameters=not REDUCES_UNUSED_PARAMETERS)
        return ZeroEngine(
            definition, parts.mesh, parts.device, parts.parallel.strategy, parts.build_optimizer, parts.loss_scaler
        )

    def _shard(self, modules: Sequence[nn.Module]) -> None:
        shard_modules(modules, self._parts.mesh, self._parts.parallel.strategy, self._parts.dtype)
