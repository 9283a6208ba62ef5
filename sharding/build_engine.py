"""From a model on the meta device to an engine: the one place that knows the order of things."""

from dataclasses import replace
from typing import Any

import torch

from sharding.accelerate_engine import AccelerateDdpEngine, AccelerateZero3Engine
from sharding.activation_checkpointing import checkpoint_activations
from sharding.blocks import find_blocks, modules_outside, refuse_scattered_layers, sharding_units
from sharding.bucketed.block_gathers import BlockBuckets
from sharding.bucketed.engine import BucketedEngine
from sharding.config import ActivationCheckpointingConfig, CompileConfig, ParallelConfig, PrecisionConfig
from sharding.ddp import DdpEngine
from sharding.deepspeed_backend.engine import DeepSpeedEngine
from sharding.deepspeed_backend.library import BlockPartitioner
from sharding.engine import Engine, ModelDefinition, OptimizerFactory
from sharding.float8 import check_float8, convert_linear_layers
from sharding.initialization import (
    Materializer,
    check_buffers,
    check_own_parameters,
    check_parameters,
    initialize_one,
    initialize_tree,
)
from sharding.loss_scaler import LossScaler
from sharding.memory_formula import BUCKET_ELEMENTS
from sharding.mesh import DataParallelMesh
from sharding.pass_agreement import PassAgreement
from sharding.precision import compute_dtype
from sharding.ranks.errors import UserError
from sharding.torch_engine import TorchEngine
from sharding.zero import REDUCES_UNUSED_PARAMETERS, ZeroEngine, refuse_scalars, shard_modules


def build_engine(
    definition: ModelDefinition,
    mesh: DataParallelMesh,
    device: torch.device,
    build_optimizer: OptimizerFactory,
    *,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    activation_checkpointing: ActivationCheckpointingConfig,
    compilation: CompileConfig,
    deepspeed_settings: dict[str, Any],
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
    if mesh.dp_degree > 1:
        refuse_scattered_layers(model, parallel.strategy)
    materializer = Materializer(device)
    shards = parallel.backend == "torch" and parallel.strategy not in ("none", "ddp")
    partitions = parallel.backend == "deepspeed" and parallel.strategy == "zero3"

    block_buckets = None
    if parallel.backend == "bucketed" and parallel.strategy == "zero3":
        block_buckets = BlockBuckets(model, mesh, dtype, BUCKET_ELEMENTS[device.type])
    if shards:
        refuse_scalars(model, parallel.strategy)
    partitioner = BlockPartitioner(deepspeed_settings, model, mesh.dp_degree) if partitions else None

    if precision.compute == "fp8":
        check_float8(model, precision.fp8_recipe, device)
    model.train()
    units = {id(members[-1]): members for members in sharding_units(model, [block for _, block in blocks])}
    for index, (name, block) in enumerate(blocks):
        for module in block.modules():
            materializer.materialize(module)
        initialize_tree(block, name, definition.seed, definition.initialize)
        check_parameters(block, name)
        if precision.compute == "fp8":
            convert_linear_layers(block, precision.fp8_recipe, device)
        checkpoint_activations(block, index, activation_checkpointing)
        if parallel.strategy not in ("none", "ddp"):
            _leave_recurrent_weights_alone(block)
        if compilation.enabled:
            block.compile(mode=None if compilation.mode == "default" else compilation.mode)
        # What blocks share is drawn anew by each of them: not before the last one.
        unit = units.get(id(block), [])
        if shards and unit:
            shard_modules(unit, mesh, parallel.strategy, dtype)
        if partitioner is not None:
            for member in unit:
                partitioner.partition(member)
        if block_buckets is not None:
            block_buckets.add(name, block)

    _initialize_outside_blocks(definition, materializer, {id(block) for _, block in blocks})
    if parallel.strategy not in ("none", "ddp"):
        _leave_recurrent_weights_alone(model)
    loss_scaler = LossScaler(precision, device) if dtype is torch.float16 else None
    if shards:
        shard_modules([model], mesh, parallel.strategy, dtype)
    definition = _compare_passes(definition, blocks, mesh, parallel)
    if shards:
        return ZeroEngine(definition, mesh, device, parallel.strategy, build_optimizer, loss_scaler)
    autocast_dtype = None if dtype is torch.float32 else dtype
    if parallel.backend == "bucketed":
        return BucketedEngine(
            definition, mesh, device, parallel.strategy, autocast_dtype, build_optimizer, loss_scaler, block_buckets
        )
    if parallel.backend == "deepspeed":
        return DeepSpeedEngine(
            definition, mesh, device, autocast_dtype, build_optimizer, deepspeed_settings, loss_scaler
        )
    if parallel.backend == "accelerate" and parallel.strategy == "zero3":
        return AccelerateZero3Engine(definition, mesh, device, dtype, build_optimizer, loss_scaler)
    engine = {"none": TorchEngine, "ddp": AccelerateDdpEngine if parallel.backend == "accelerate" else DdpEngine}
    return engine[parallel.strategy](definition, mesh, device, autocast_dtype, build_optimizer, loss_scaler)


def _leave_recurrent_weights_alone(module: torch.nn.Module) -> None:
    """Keep recurrent layers from copying their weights into one piece of memory, as cuDNN likes them.

    The copy is made at the first forward pass on a GPU, and the layer computes with it from then on. What is gathered
    or updated afterwards in the memory that the strategy manages would no longer reach it.
    """
    for recurrent in module.modules():
        if isinstance(recurrent, torch.nn.RNNBase):
            recurrent.flatten_parameters = lambda: None  # type: ignore[method-assign]


def _compare_passes(
    definition: ModelDefinition,
    blocks: list[tuple[str, torch.nn.Module]],
    mesh: DataParallelMesh,
    parallel: ParallelConfig,
) -> ModelDefinition:
    """Let ranks compare their first passes, where a collective of one is taken for that of another if they differ."""
    if mesh.dp_degree == 1 or parallel.strategy in ("none", "ddp") or parallel.backend == "bucketed":
        return definition
    is_deepspeed = parallel.backend == "deepspeed"
    agreement = PassAgreement(
        definition.model,
        _gathered_when_called(definition.model, blocks, parallel),
        f"parallel.backend={parallel.backend} with parallel.strategy={parallel.strategy}",
        compares_parameters=is_deepspeed or not REDUCES_UNUSED_PARAMETERS,
    )
    return replace(definition, loss=agreement.watch(definition.loss))


def _gathered_when_called(
    model: torch.nn.Module, blocks: list[tuple[str, torch.nn.Module]], parallel: ParallelConfig
) -> list[tuple[str, torch.nn.Module]]:
    """Modules at whose call parameters are gathered, apart from the model itself."""
    if parallel.backend != "deepspeed":
        return blocks
    if parallel.strategy != "zero3":
        return []
    outside = modules_outside(model, [block for _, block in blocks])
    own = {id(module) for module in outside if next(module.parameters(recurse=False), None) is not None}
    return [*blocks, *((name, module) for name, module in model.named_modules() if id(module) in own)]


def _initialize_outside_blocks(definition: ModelDefinition, materializer: Materializer, block_ids: set[int]) -> None:
    """Embeddings, final norm, head: everything that is in no block, children before parents."""
    model = definition.model
    outside: list[tuple[str, torch.nn.Module]] = []

    def collect(module: torch.nn.Module, name: str) -> None:
        for child_name, child in module.named_children():
            if id(child) not in block_ids:
                collect(child, f"{name}.{child_name}" if name else child_name)
        outside.append((name, module))

    collect(model, "")
    for _, module in outside:
        materializer.materialize(module)
    # A block that shares parameters with what is outside is not sharded yet.
    own = {id(p) for _, module in outside for p in module.parameters(recurse=False)}
    inside = [p for m in model.modules() if id(m) in block_ids for p in m.parameters() if id(p) not in own]
    versions = [p._version for p in inside]
    for name, module in outside:
        initialize_one(module, name, definition.seed, definition.initialize)
        if versions != [p._version for p in inside]:
            # A draw into a sharded block would depend on the layout.
            raise UserError(
                f"{type(module).__name__} initialises parameters of blocks inside it, which would depend on how they "
                "are divided over ranks; let each module initialise its own, in a method reset_parameters."
            )
    for name, module in outside:
        check_own_parameters(module, name)
    check_buffers(model)
