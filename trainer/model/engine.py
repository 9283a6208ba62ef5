"""From the model's configuration to an engine that holds it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from sharding.blocks import hidden_matrices
from sharding.build_engine import build_engine
from sharding.engine import Batch, Engine, EvaluationFunction, LossFunction, ModelDefinition
from sharding.initialization import InitializeModule
from sharding.mesh import ParallelMesh
from sharding.precision import compute_dtype
from sharding.ranks.process_group import Ranks
from sharding.state import hash_over_ranks
from trainer.config import RunConfig
from trainer.config.deepspeed_settings import deepspeed_settings
from trainer.data.facts import SampleFacts
from trainer.model.lora import add_adapters, initializing_adapters, plain_name
from trainer.model.models import ModelFacts, build_model_on_meta, model_facts, transformers_config
from trainer.model.pretrained import PretrainedWeights
from trainer.model.quantization_aware import make_aware
from trainer.model.refusals import refuse_positions_by_padding, refuse_settings
from trainer.optimizers.build import optimizer_factory
from trainer.optimizers.layer_decay import depth_scales, describe_depth_scales
from trainer.tasks.named_sums import NamedSums
from trainer.tasks.task import Task


def build_model_engine(
    config: RunConfig,
    task: Task,
    mesh: ParallelMesh,
    ranks: Ranks,
    facts: SampleFacts,
    timed: Callable[[LossFunction], LossFunction] = lambda loss: loss,
    evaluate: EvaluationFunction | None = None,
    *,
    loads_pretrained: bool = True,
    training_loss: LossFunction | None = None,
    add_modules: Callable[[nn.Module], Iterable[nn.Module]] = lambda _: (),
) -> tuple[Engine, ModelFacts]:
    """The sharded model with its optimizer, with initial or pretrained parameters.

    Args:
        config: the run.
        task: builds the model and computes the loss.
        mesh: the ranks.
        ranks: this rank's place.
        facts: of the samples.
        timed: wraps the forward pass and loss, to measure them.
        evaluate: the task's evaluation; given by whoever wants the sums by name.
        loads_pretrained: whether the weights of ``model.pretrained`` are loaded; not where a checkpoint's will be.
        training_loss: in place of the task's own.
        add_modules: gives the model on the meta device modules that this loss alone calls, and returns those that are
            to be initialised by their own ``reset_parameters``.

    Raises:
        UserError: model, tokenizer, sequence length, task and strategy do not fit together.
    """
    model = build_model_on_meta(task, config.model, facts)
    model_config = transformers_config(model, config.model, facts)
    if model_config is not None:
        refuse_settings(config, task, model_config, mesh.dims)
        refuse_positions_by_padding(config, model, model_config)
    # Before adapters rename tensors and sharding changes classes, and there is memory for what may not be there.
    pretrained = (
        None
        if config.model.pretrained is None or not loads_pretrained
        else PretrainedWeights(
            config.model.pretrained,
            model,
            task.pretrained_name,
            has_new_head=config.model.new_head,
            resizes_vocabulary=config.model.resize_vocabulary,
            # Where another run's weights come on top, it may be these that lack a head.
            may_have_none=config.checkpoint.from_ is not None,
        )
    )
    adapters = add_adapters(model, config.model)
    rounded = make_aware(model, config.model)
    counted = model_facts(model, model_config, reads_tokens=facts.vocab_size is not None)
    scales = depth_scales(model, config.optimizer.layer_decay)
    hidden = hidden_matrices(model)
    added = {id(module): module for module in add_modules(model)}
    definition = ModelDefinition(
        model=model,
        initialize=_initializing(added, initializing_adapters(model, lambda module: task.initialize(model, module))),
        loss=timed(training_loss or _training_loss(task)),
        evaluate=evaluate or NamedSums(task),
        seed=config.seed,
    )
    engine = build_engine(
        definition,
        mesh,
        ranks.device,
        optimizer_factory(config.optimizer, hidden, scales),
        parallel=config.parallel,
        precision=config.precision,
        activation_checkpointing=config.activation_checkpointing,
        compilation=config.compile,
        deepspeed_settings=deepspeed_settings(config, mesh.dims) if config.parallel.backend == "deepspeed" else {},
    )
    notes = [describe_depth_scales(scales, config.optimizer.layer_decay)] if scales else []
    if pretrained is not None:
        pretrained.load_into(engine, own_name=plain_name if config.model.lora.rank else str)
        notes += [pretrained.new_head, pretrained.new_rows]
    return engine, replace(counted, notes=tuple(filter(None, [adapters, rounded, *notes])))


def _initializing(added: Mapping[int, nn.Module], others: InitializeModule) -> InitializeModule:
    def initialize(module: nn.Module) -> None:
        if id(module) in added:
            added[id(module)].reset_parameters()  # type: ignore[operator]
        else:
            others(module)

    return initialize


def _training_loss(task: Task) -> LossFunction:
    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        return task.loss(task.forward(model, batch), batch)

    return loss


def parameter_hash(engine: Engine, ranks: Ranks) -> str:
    """A hash of all parameters that does not depend on the layout; every rank must call it."""
    return f"{hash_over_ranks(engine.state(with_optimizer=False), ranks):016x}"


def describe_model(config: RunConfig, facts: ModelFacts, ranks: Ranks) -> str:
    """One line for the log: model, ranks, strategy, precision."""
    dtype = str(compute_dtype(config.precision, ranks.device)).removeprefix("torch.")
    chosen = " (auto)" if config.precision.compute == "auto" else ""
    if config.precision.compute == "fp8":
        emulated = "" if ranks.device.type == "cuda" else ", emulated, for a CPU has no such products"
        chosen = (
            f", {facts.num_float8_linears} of {facts.num_block_linears} linear layers of blocks in float8 "
            f"({config.precision.fp8_recipe}{emulated})"
        )
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
    backend = "" if config.parallel.backend == "torch" else f"{config.parallel.backend} "
    flops = ""
    if facts.is_per_token:
        flops = f", {facts.flops_per_token(config.data.sequence_length, causal=False) / 1e6:,.1f} MFLOP per token"
    trained = f", {facts.num_parameters - facts.num_frozen:,} of them trained" if facts.num_frozen else ""
    return (
        f"{config.model.name}: {facts.num_parameters:,} parameters{trained}{flops}; "
        f"{backend}{config.parallel.strategy} on {ranks.world_size} x {device}, {dtype}{chosen}"
    )
