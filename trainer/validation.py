"""Rules that span several settings of a run, and the arithmetic of ranks and batch; imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharding.errors import UserError
from trainer.data.rules import validate_data

if TYPE_CHECKING:
    from trainer.config import RunConfig


@dataclass(frozen=True)
class World:
    """How many ranks there are and what they run on."""

    num_ranks: int
    has_gpu: bool


def accumulation_steps(config: "RunConfig", num_ranks: int) -> int:
    """Micro-batches of one rank in one optimizer step.

    Raises:
        UserError: batch.global_size is not a multiple of batch.micro_size x ranks.
    """
    global_size, micro_size = config.batch.global_size, config.batch.micro_size
    if global_size % (micro_size * num_ranks):
        per_pass = micro_size * num_ranks
        lower = global_size // per_pass * per_pass
        advice = " or ".join(str(size) for size in (lower, lower + per_pass) if size)
        raise UserError(
            f"batch.global_size={global_size} is not divisible by batch.micro_size={micro_size} x "
            f"{num_ranks} ranks = {per_pass}; set batch.global_size to {advice}, or another batch.micro_size."
        )
    return global_size // (micro_size * num_ranks)


def validate(config: "RunConfig", world: World | None = None) -> None:
    """Every rule that spans several settings; with ``world`` also those that depend on the ranks.

    Raises:
        UserError: a rule is broken.
    """
    _validate_model_and_data(config)
    _validate_parallel(config)
    _validate_schedule(config)
    if config.optimizer.nesterov and config.optimizer.momentum == 0:
        raise UserError("optimizer.nesterov=true needs optimizer.momentum > 0, but it is 0; set it to 0.9, say.")
    if config.checkpoint.load == "weights" and config.checkpoint.from_ is None:
        raise UserError("checkpoint.load=weights needs checkpoint.from, which is not set; name the run to start from.")
    if world is not None:
        _validate_world(config, world)


def _validate_model_and_data(config: "RunConfig") -> None:
    model, data = config.model, config.data
    if (model.architecture is None) == (model.pretrained is None):
        raise UserError(
            f"model.architecture={model.architecture} and model.pretrained={model.pretrained}: set exactly one of them."
        )
    if model.pretrained is not None and model.config:
        raise UserError("model.config cannot change a model that model.pretrained names; remove model.config.")
    validate_data(data)


def _validate_parallel(config: "RunConfig") -> None:
    parallel = config.parallel
    if parallel.backend != "torch":
        raise UserError(f"parallel.backend={parallel.backend} is not there yet; use parallel.backend=torch.")
    for axis in ("tensor", "context", "pipeline"):
        degree = getattr(parallel, axis)
        if degree != 1:
            raise UserError(f"parallel.{axis}={degree} is not there yet; only 1 is accepted for now.")
    if config.precision.compute in ("fp16", "fp8"):
        raise UserError(f"precision.compute={config.precision.compute} is not there yet; use auto, fp32 or bf16.")
    if parallel.replicate > 1 and parallel.strategy != "hsdp":
        raise UserError(
            f"parallel.replicate={parallel.replicate} has a meaning under strategy hsdp only, but "
            f"parallel.strategy={parallel.strategy}; set it to hsdp or parallel.replicate to 1."
        )


def _validate_schedule(config: "RunConfig") -> None:
    schedule = config.schedule
    total = schedule.total_steps or config.steps
    if schedule.warmup_steps > total:
        raise UserError(
            f"schedule.warmup_steps={schedule.warmup_steps} is more than the {total} steps of the schedule; lower it."
        )
    if schedule.decay_steps and schedule.name != "wsd":
        raise UserError(f"schedule.decay_steps has a meaning under wsd only, but schedule.name={schedule.name}.")
    if schedule.warmup_steps + schedule.decay_steps > total:
        raise UserError(
            f"schedule.warmup_steps={schedule.warmup_steps} + schedule.decay_steps={schedule.decay_steps} is more "
            f"than the {total} steps of the schedule; lower one of them."
        )


def _validate_world(config: "RunConfig", world: World) -> None:
    parallel, num_ranks = config.parallel, world.num_ranks
    if parallel.strategy == "none" and num_ranks > 1:
        raise UserError(
            f"parallel.strategy=none runs on one rank, but there are {num_ranks}; "
            "choose ddp or zero1-3, or start one rank (--nproc-per-node 1)."
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
    accumulation_steps(config, num_ranks)
