"""From a model on the meta device to an engine: the one place that knows the order of things."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sharding.accelerate_engine import AccelerateDdpEngine, AccelerateZero3Builder
from sharding.activation_checkpointing import checkpoint_activations, keep_within_budget
from sharding.batch_norm import batch_norm_group, refuse_batch_norm, synchronize_batch_norm
from sharding.blocks import find_blocks, refuse_scattered_layers
from sharding.bucketed.builder import BucketedBuilder, BucketedZero3Builder
from sharding.config import (
    ActivationCheckpointingConfig,
    Backend,
    CompileConfig,
    ParallelConfig,
    PrecisionConfig,
    Strategy,
)
from sharding.ddp import DdpEngine
from sharding.deepspeed_backend.builder import DeepSpeedBuilder, DeepSpeedZero3Builder
from sharding.engine import Engine, ModelDefinition, OptimizerFactory
from sharding.engine_builder import EngineBuilder, EngineParts, WholeModelBuilder
from sharding.float8 import check_float8, convert_linear_layers
from sharding.initialization import (
    Materializer,
    check_parameters,
    initialize_outside_blocks,
    initialize_tree,
)
from sharding.loss_scaler import LossScaler
from sharding.mesh import ParallelMesh
from sharding.precision import compute_dtype, computing_in
from sharding.recurrent_weights import leave_recurrent_weights_alone
from sharding.torch_engine import TorchEngine
from sharding.zero import FullyShardBuilder

BUILDERS: dict[Backend, dict[Strategy, Callable[[EngineParts], EngineBuilder]]] = {
    "torch": {
        "none": partial(WholeModelBuilder, TorchEngine),
        "ddp": partial(WholeModelBuilder, DdpEngine),
        "zero1": FullyShardBuilder,
        "zero2": FullyShardBuilder,
        "zero3": FullyShardBuilder,
        "hsdp": FullyShardBuilder,
    },
    "bucketed": {
        "zero1": BucketedBuilder,
        "zero2": BucketedBuilder,
        "zero3": BucketedZero3Builder,
        "hsdp": BucketedZero3Builder,
    },
    "deepspeed": {"zero1": DeepSpeedBuilder, "zero2": DeepSpeedBuilder, "zero3": DeepSpeedZero3Builder},
    "accelerate": {"ddp": partial(WholeModelBuilder, AccelerateDdpEngine), "zero3": AccelerateZero3Builder},
}
"""Who lays the model on ranks, for every pair that there is."""

_PRECISION = PrecisionConfig()
_ACTIVATION_CHECKPOINTING = ActivationCheckpointingConfig()
_COMPILATION = CompileConfig()


def build_engine(
    definition: ModelDefinition,
    mesh: ParallelMesh,
    device: torch.device,
    build_optimizer: OptimizerFactory,
    *,
    parallel: ParallelConfig,
    precision: PrecisionConfig = _PRECISION,
    activation_checkpointing: ActivationCheckpointingConfig = _ACTIVATION_CHECKPOINTING,
    compilation: CompileConfig = _COMPILATION,
    deepspeed_settings: dict[str, Any] | None = None,
) -> Engine:
    """Bring a model to life under a strategy.

    Block by block: memory, initial values, checkpointing, compilation, sharding. So a rank holds one whole block at a
    time beside its shards, or those that share parameters, and initial values do not depend on the layout. The
    optimizer comes last, when parameters lie where they will stay.

    Args:
        definition: the model and its functions.
        mesh: the ranks.
        device: where this rank computes.
        build_optimizer: called once, when parameters lie where they stay.
        parallel: strategy and backend.
        precision: number formats.
        activation_checkpointing: what is recomputed.
        compilation: what is compiled.
        deepspeed_settings: DeepSpeed's configuration, read under that backend alone.

    Raises:
        UserError: the device or the model does not have the precision, the strategy does not find its layers or cannot
            divide a parameter, or initialisation left a tensor without values or touched a block from outside.
    """
    dtype = compute_dtype(precision, device)
    model = definition.model
    blocks = find_blocks(model)
    refuse_batch_norm(model, activation_checkpointing)
    norm_group = batch_norm_group(model, mesh)
    if mesh.reduction.degree > 1:
        refuse_scattered_layers(model, parallel.strategy)
    parts = EngineParts(
        definition=computing_in(definition, dtype),
        blocks=blocks,
        mesh=mesh,
        device=device,
        dtype=dtype,
        build_optimizer=build_optimizer,
        parallel=parallel,
        loss_scaler=LossScaler(precision, device) if dtype is torch.float16 else None,
        deepspeed_settings=deepspeed_settings or {},
    )
    builder = BUILDERS[parallel.backend][parallel.strategy](parts)
    if precision.compute == "fp8":
        check_float8(model, precision.fp8_recipe, device)
    model.train()
    materializer = Materializer(device)
    for index, (name, block) in enumerate(blocks):
        for module in block.modules():
            materializer.materialize(module)
        initialize_tree(block, name, definition.seed, definition.initialize)
        check_parameters(block, name)
        synchronize_batch_norm(block, norm_group, is_compiled=compilation.enabled)
        if precision.compute == "fp8":
            convert_linear_layers(block, precision.fp8_recipe, device)
        checkpoint_activations(block, index, activation_checkpointing)
        leave_recurrent_weights_alone(block)
        if compilation.enabled:
            block.compile(mode=None if compilation.mode == "default" else compilation.mode)
            keep_within_budget(block, activation_checkpointing)
        builder.prepare_block(name, block)
    initialize_outside_blocks(model, definition.seed, definition.initialize, materializer, [b for _, b in blocks])
    synchronize_batch_norm(model, norm_group, is_compiled=compilation.enabled)
    leave_recurrent_weights_alone(model)
    return builder.finish(model)
