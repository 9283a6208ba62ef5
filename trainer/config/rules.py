"""Rules that span several settings of a run, and the arithmetic of ranks and batch; imports no torch."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sharding.config import FLOAT8_MULTIPLE, Backend, Strategy
from sharding.parallel_dims import ParallelDims, parallel_dims
from sharding.ranks.errors import UserError
from sharding.strict_model import check_choices
from trainer.config.budget import validate_budget, validate_schedule
from trainer.config.checkpoint import validate_changes
from trainer.config.data import validate_data
from trainer.config.distill import validate_distill
from trainer.config.evaluation import validate_evaluation
from trainer.config.evaluation_sets import validate_sets
from trainer.config.messages import validate_messages
from trainer.config.networks import validate_model
from trainer.config.optimizer import validate_optimizer
from trainer.config.prune_rules import validate_prune
from trainer.config.rows import TASK_SAMPLES
from trainer.config.rows_rules import validate_rows
from trainer.config.stages import errors_of_stage, stages_of, validate_stages
from trainer.config.tracking import check_packages

if TYPE_CHECKING:
    from sharding.config import ParallelConfig
    from trainer.config.schema import RunConfig

BACKEND_STRATEGIES: dict[Backend, tuple[Strategy, ...]] = {
    "torch": ("none", "ddp", "zero1", "zero2", "zero3", "hsdp"),
    "bucketed": ("zero1", "zero2", "zero3", "hsdp"),
    "deepspeed": ("zero1", "zero2", "zero3"),
    "accelerate": ("ddp", "zero3"),
}
"""Which strategies each backend carries out."""


@dataclass(frozen=True)
class World:
    """How many ranks there are and what they run on.

    Attributes:
        num_ranks: all of them.
        has_gpu: whether they compute on GPUs.
        num_local_ranks: those of this node; None where it has them all.
    """

    num_ranks: int
    has_gpu: bool
    num_local_ranks: int | None = None


def accumulation_steps(config: "RunConfig", dims: ParallelDims) -> int:
    """Micro-batches of one rank in one optimizer step.

    Raises:
        UserError: batch.global_size is not a multiple of batch.micro_size x ranks that read different data.
    """
    global_size, micro_size, data_degree = config.batch.global_size, config.batch.micro_size, dims.data_degree
    if global_size % (micro_size * data_degree):
        per_pass = micro_size * data_degree
        lower = global_size // per_pass * per_pass
        advice = " or ".join(str(size) for size in (lower, lower + per_pass) if size)
        raise UserError(
            f"batch.global_size={global_size} is not divisible by batch.micro_size={micro_size} x "
            f"{_data_ranks(dims)} = {per_pass}; set batch.global_size to {advice}, or another batch.micro_size."
        )
    return global_size // (micro_size * data_degree)


def _data_ranks(dims: ParallelDims) -> str:
    return f"{dims.data_degree} {'ranks' if dims.data_degree == dims.world_size else 'data-parallel ranks'}"


def validate(config: "RunConfig", world: World | None = None) -> None:
    """Every rule that spans several settings; with ``world`` also those that depend on the ranks.

    Raises:
        UserError: a rule is broken.
    """
    if config.stages:
        validate_stages(config)
    else:
        validate_budget(config)
    stages = stages_of(config)
    num_steps = config.num_steps if config.is_length_known else None
    for stage in stages:
        with errors_of_stage(stage.name):
            _validate_alone(stage.config, world, num_steps, has_own_schedule=stage.has_own_schedule)
    if not all(stage.has_own_schedule for stage in stages):
        validate_schedule(config)


def _validate_alone(config: "RunConfig", world: World | None, num_steps: int | None, *, has_own_schedule: bool) -> None:
    _validate_model_and_data(config)
    check_choices(config)
    _validate_parallel(config)
    _validate_float8(config)
    _validate_compilation(config)
    if has_own_schedule:
        validate_schedule(config)
    validate_changes(config.checkpoint)
    _validate_faults(config)
    validate_optimizer(config.optimizer, config.parallel.backend)
    validate_prune(config, num_steps)
    validate_evaluation(config, num_steps)
    _validate_replica_check(config)
    if world is not None:
        _validate_world(config, world)


def _validate_model_and_data(config: "RunConfig") -> None:
    _validate_loss(config)
    validate_model(config.model, config.task.name)
    validate_messages(config)
    _validate_masks(config)
    loads_weights = config.checkpoint.from_ is not None and config.checkpoint.load == "weights"
    if config.model.new_head and config.model.pretrained is None and not loads_weights:
        raise UserError(
            "model.new_head=true is for weights that are stored, but neither model.pretrained nor checkpoint.from with "
            "checkpoint.load=weights names any; remove it."
        )
    rank = config.model.lora.rank
    if rank and config.model.pretrained is None and config.checkpoint.from_ is None:
        raise UserError(
            f"model.lora.rank={rank} trains adapters beside weights that stay as they are, but neither "
            "model.pretrained nor checkpoint.from names any; set one of them, or remove model.lora."
        )
    validate_data(config.data)
    validate_rows(config.data, config.task.name)
    validate_sets(config)
    validate_distill(config.distill)


def _validate_masks(config: "RunConfig") -> None:
    is_masked = config.task.name == "masked-lm"
    if is_masked and config.data.has_tokens and not config.data.mask_token:
        raise UserError("task.name=masked-lm hides tokens behind a mask token, but data.mask_token=false; remove it.")
    if is_masked and config.data.document_mask:
        raise UserError(
            "data.document_mask=true keeps documents apart under task.name=causal-lm only: the encoders of masked-lm "
            "attend to the whole sequence; set it to false."
        )


def _validate_loss(config: "RunConfig") -> None:
    task = config.task
    of_numbers = ("mse", "huber")
    if task.name in TASK_SAMPLES and task.loss != "auto" and (task.loss in of_numbers) != (task.name == "regression"):
        fits = of_numbers if task.name == "regression" else ("cross-entropy", "binary-cross-entropy")
        raise UserError(
            f"task.loss={task.loss} is none of task.name={task.name}, whose losses are {' and '.join(fits)}; set one "
            "of them, or leave it out."
        )


def _validate_parallel(config: "RunConfig") -> None:
    parallel = config.parallel
    _validate_backend(parallel)
    for axis in ("tensor", "context", "pipeline", "expert"):
        degree = getattr(parallel, axis)
        if degree != 1:
            raise UserError(f"parallel.{axis}={degree} is not there yet; only 1 is accepted for now.")


def _validate_float8(config: "RunConfig") -> None:
    precision, backend = config.precision, config.parallel.backend
    if precision.compute != "fp8":
        return
    if backend not in ("torch", "bucketed"):
        raise UserError(
            "precision.compute=fp8 is there under parallel.backend=torch or bucketed only, but it is "
            f"{backend}; choose one of these, or precision.compute=bf16."
        )
    length = config.data.sequence_length
    if config.batch.micro_size * length % FLOAT8_MULTIPLE:
        raise UserError(
            f"precision.compute=fp8 adds up gradients over batch.micro_size={config.batch.micro_size} x "
            f"data.sequence_length={length} = {config.batch.micro_size * length} tokens, which is no multiple of "
            f"{FLOAT8_MULTIPLE}; change one of them, or set precision.compute=bf16."
        )
    if config.data.document_mask and precision.fp8_recipe == "tensorwise":
        raise UserError(
            "data.document_mask=true keeps documents apart, but precision.fp8_recipe=tensorwise has one scale for all "
            "that is in a micro-batch; set precision.fp8_recipe=rowwise, data.document_mask=false, or "
            "precision.compute=bf16."
        )


def _validate_compilation(config: "RunConfig") -> None:
    mode = config.compile.mode
    if mode in ("reduce-overhead", "max-autotune"):
        raise UserError(
            f"compile.mode={mode} replays CUDA graphs, which overwrite what the micro-batch before has left, and no "
            "GPU has shown yet that gradients are right under accumulation (python -m benchmarks.device will); use "
            "compile.mode=default or max-autotune-no-cudagraphs."
        )
    if config.activation_checkpointing.mode == "budget" and not config.compile.enabled:
        raise UserError(
            "activation_checkpointing.mode=budget is kept by the compiler, but compile.enabled=false; set "
            "compile.enabled=true, or activation_checkpointing.mode=selective."
        )


def _validate_backend(parallel: "ParallelConfig") -> None:
    backend, strategy = parallel.backend, parallel.strategy
    if strategy not in BACKEND_STRATEGIES[backend]:
        legal = ", ".join(BACKEND_STRATEGIES[backend])
        raise UserError(
            f"parallel.backend={backend} cannot do parallel.strategy={strategy}, only {legal}; choose one of these, or "
            "parallel.backend=torch, which has all."
        )
    uses_files = "nvme" in (parallel.offload_parameters, parallel.offload_optimizer)
    if uses_files != (parallel.nvme_path is not None):
        raise UserError(
            f"parallel.nvme_path={parallel.nvme_path}, parallel.offload_parameters={parallel.offload_parameters} and "
            f"parallel.offload_optimizer={parallel.offload_optimizer}: a folder is named if and only if something is "
            "offloaded to nvme; change one of them."
        )
    if parallel.offload_optimizer == "nvme" and strategy != "zero3":
        raise UserError(
            f"parallel.offload_optimizer=nvme needs parallel.strategy=zero3, but it is {strategy}; change one of them."
        )


def _validate_replica_check(config: "RunConfig") -> None:
    every_steps, parallel = config.faults.replica_check_every_steps, config.parallel
    gathers_after_step = parallel.backend in ("bucketed", "deepspeed")
    whole_on_each = ("ddp", "hsdp", "zero1", "zero2") if gathers_after_step else ("ddp", "hsdp")
    if every_steps and parallel.strategy not in whole_on_each:
        raise UserError(
            f"faults.replica_check_every_steps={every_steps} compares copies of parameters, but under "
            f"parallel.backend={parallel.backend} parallel.strategy={parallel.strategy} no rank holds between steps "
            "what another one holds; set it to 0, or use parallel.strategy=ddp or hsdp."
        )


def _validate_faults(config: "RunConfig") -> None:
    faults = config.faults
    policy = faults.spike_policy
    if faults.spike_warmup_steps > faults.spike_window_steps:
        raise UserError(
            f"faults.spike_warmup_steps={faults.spike_warmup_steps} is more than faults.spike_window_steps="
            f"{faults.spike_window_steps}, so that no step would ever be judged; lower it, or widen the window."
        )
    if policy in ("skip", "rollback") and config.data.streaming:
        raise UserError(
            f"faults.spike_policy={policy} skips samples by their position, which those of a stream do not have "
            "(data.streaming=true); use faults.spike_policy=warn, or prepare the corpus."
        )
    if policy == "rollback" and config.checkpoint.every_steps == 0:
        raise UserError(
            "faults.spike_policy=rollback returns to a checkpoint, but checkpoint.every_steps=0 saves none before the "
            "end; set it to 100, say, or use faults.spike_policy=skip."
        )


def _validate_world(config: "RunConfig", world: World) -> None:
    parallel, num_ranks = config.parallel, world.num_ranks
    if parallel.backend == "accelerate" and parallel.strategy == "zero3" and not world.has_gpu:
        raise UserError(
            "parallel.backend=accelerate does parallel.strategy=zero3 on GPUs alone: without one it would train plain "
            "DDP and say nothing; use parallel.backend=torch or deepspeed, or parallel.strategy=ddp."
        )
    optimizer, compute, rank = config.optimizer.name, config.precision.compute, config.model.lora.rank
    for setting, is_set, package, extra, other in (
        ("optimizer.name=adamw8bit", optimizer == "adamw8bit", "torchao", "eight-bit", "set optimizer.name to adamw"),
        ("precision.compute=fp8", compute == "fp8", "torchao", "eight-bit", "set precision.compute to bf16"),
        (f"model.lora.rank={rank}", rank > 0, "peft", "lora", "remove model.lora"),
    ):
        if is_set and find_spec(package) is None:
            raise UserError(
                f"{setting} needs {package}, which is not installed; install it with pip install "
                f"'shardline[{extra}]', or {other}."
            )
    if parallel.strategy == "none" and num_ranks > 1:
        raise UserError(
            f"parallel.strategy=none runs on one rank, but there are {num_ranks}; "
            "choose ddp or zero1-3, or start one rank (--nproc-per-node 1)."
        )
    if config.faults.replica_check_every_steps and num_ranks == 1:
        raise UserError(
            f"faults.replica_check_every_steps={config.faults.replica_check_every_steps} compares ranks, but there is "
            "1; set it to 0, or start more ranks (--nproc-per-node)."
        )
    if parallel.strategy == "hsdp":
        if parallel.replicate < 2:
            raise UserError(
                f"parallel.strategy=hsdp needs parallel.replicate >= 2, but it is {parallel.replicate}; "
                "set it to the number of replicas, or use zero3."
            )
        if num_ranks % parallel.replicate or num_ranks // parallel.replicate < 2:
            raise UserError(
                f"parallel.replicate={parallel.replicate} does not fit {num_ranks} ranks: hsdp needs replicate x "
                f"shard = ranks with shard >= 2; start {2 * parallel.replicate} ranks or change parallel.replicate."
            )
    dims = parallel_dims(parallel, num_ranks)
    if accumulation_steps(config, dims) * dims.data_degree == 1 and config.metrics.gradient_noise_scale:
        raise UserError(
            "metrics.gradient_noise_scale=true compares micro-batches with the whole batch, but batch.global_size="
            f"{config.batch.global_size} is one micro-batch of batch.micro_size={config.batch.micro_size} on 1 rank; "
            "lower batch.micro_size or raise batch.global_size."
        )
    check_packages(config.tracking)
