"""ZeRO stages 1 to 3 and HSDP as settings of one mechanism, torch's ``fully_shard``.

Stage 1 keeps gradients whole during accumulation and shards optimizer state (and, between steps, parameters); stage 2
reduce-scatters the gradients of every micro-batch; stage 3 also frees parameters after each block's forward pass; hsdp
is stage 3 inside groups of ranks, with an all-reduce across groups on the last micro-batch. Stages as in Rajbhandari et
al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from sharding.blocks import find_blocks, modules_outside
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
from sharding.sharder import ModelSharder
from sharding.torch_engine import TorchEngine

REDUCES_UNUSED_PARAMETERS = hasattr(FSDPModule, "set_reduce_scatter_unused_params")
"""Whether ``fully_shard`` can reduce gradients of parameters that only some ranks use; torch 2.11 cannot."""


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
    """A model sharded by ``ModelSharder``."""

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
        # Between micro-batches; what is in no block is whole from forward to backward under every strategy, so it costs
        # no memory to keep it.
        self._kept_modules = self._sharded_modules
        if strategy in ("zero3", "hsdp"):
            outside = modules_outside(self._model, [block for _, block in find_blocks(self._model)])
            self._kept_modules = [module for module in outside if isinstance(module, FSDPModule)]
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
        # No backward pass follows that would free the gathered parameters, and named_parameters() would show them
        # instead of the shards.
        for module in self._sharded_modules:
            module.reshard()
        return sums

    def _accumulation_context(self, *, is_last: bool) -> AbstractContextManager[Any]:
        for module in self._sharded_modules:
            if self._strategy == "zero1":
                module.set_requires_gradient_sync(is_last, recurse=False)
            if self._strategy == "hsdp":
                module.set_requires_all_reduce(is_last, recurse=False)
        for module in self._kept_modules:
            module.set_reshard_after_backward(is_last, recurse=False)
        # set_is_last_backward stays true: else what was last sent of gradients would be held through the next forward
        # pass.
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
        self._sharder = ModelSharder(
            parts.definition.model,
            [block for _, block in parts.blocks],
            parts.mesh,
            frees_blocks=parts.parallel.strategy in ("zero3", "hsdp"),
            dtype=parts.dtype,
        )

    def prepare_block(self, name: str, block: nn.Module) -> None:
        """See EngineBuilder; blocks that share parameters are sharded together, after the last of them."""
        self._sharder.shard_block(block)

    def finish(self, model: nn.Module) -> Engine:
        """See EngineBuilder."""
        self._sharder.shard_rest()
        parts = self._parts
        definition = compare_passes(parts, parts.blocks, compares_parameters=not REDUCES_UNUSED_PARAMETERS)
        return ZeroEngine(
            definition, parts.mesh, parts.device, parts.parallel.strategy, parts.build_optimizer, parts.loss_scaler
        )
