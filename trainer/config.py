"""RunConfig: one file plus overrides becomes one strict, frozen description of a run. Imports no torch."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from sharding.config import ActivationCheckpointingConfig, CompileConfig, ParallelConfig, PrecisionConfig
from sharding.errors import UserError
from sharding.strict_model import StrictModel
from trainer.checkpoint.config import CheckpointConfig
from trainer.data.config import DataConfig
from trainer.sections import (
    BatchConfig,
    EvaluationConfig,
    FaultsConfig,
    LaunchConfig,
    MetricsConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TaskConfig,
)
from trainer.trackers.config import TrackingConfig
from trainer.yaml_files import parse_yaml, read_yaml_mapping


class RunConfig(StrictModel):
    """Everything that describes a run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder under output_dir; letters, digits, `.`, `_` and `-`."""

    seed: int = Field(default=1234, ge=0, lt=2**63)
    """Seed of initial parameters, data order and dropout."""

    steps: int = Field(ge=1)
    """Optimizer steps after which the run is finished."""

    deterministic: bool = False
    """Use only deterministic kernels, so that a GPU run repeats bit for bit; CPU runs always do."""

    output_dir: str = "runs"
    """Folder that run folders are created in."""

    task: TaskConfig = TaskConfig()
    """What the model is trained to do."""

    model: ModelConfig
    """Which model is trained."""

    data: DataConfig = DataConfig()
    """Corpus and sequences."""

    batch: BatchConfig = BatchConfig()
    """Sequences per step."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and clipping."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule."""

    parallel: ParallelConfig = ParallelConfig()
    """How state and batch are divided over ranks."""

    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""

    compile: CompileConfig = CompileConfig()
    """Compilation of blocks."""

    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    """Recomputed activations."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out loss."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and continuing."""

    metrics: MetricsConfig = MetricsConfig()
    """Measurements."""

    tracking: TrackingConfig = TrackingConfig()
    """Trackers."""

    launch: LaunchConfig = LaunchConfig()
    """How ranks are started."""

    faults: FaultsConfig = FaultsConfig()
    """Reaction to faults."""

    @property
    def run_dir(self) -> Path:
        """The run's folder, ``output_dir/name``."""
        return Path(self.output_dir) / self.name


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``key.sub=value`` overrides and check the result.

    Raises:
        UserError: the file cannot be read or parsed, a key is unknown, or a value is wrong.
    """
    values = read_yaml_mapping(Path(path))
    for override in overrides:
        _apply_override(values, override)
    return parse_config(values, source=str(path))


def parse_config(values: dict[str, Any], source: str) -> RunConfig:
    """Turn plain values into a checked RunConfig.

    Args:
        values: nested mapping as read from YAML.
        source: what to call the origin of the values in an error.

    Raises:
        UserError: a key is unknown or a value is wrong; every problem is named.
    """
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors()]
        raise UserError(f"{source}: " + "\n".join(problems)) from None
    validate(config)
    return config


def config_to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML that load_config reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


@dataclass(frozen=True)
class World:
    """How many ranks there are and what they run on."""

    num_ranks: int
    has_gpu: bool


def accumulation_steps(config: RunConfig, num_ranks: int) -> int:
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


def validate(config: RunConfig, world: World | None = None) -> None:
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


def _validate_model_and_data(config: RunConfig) -> None:
    model, data = config.model, config.data
    if (model.architecture is None) == (model.pretrained is None):
        raise UserError(
            f"model.architecture={model.architecture} and model.pretrained={model.pretrained}: set exactly one of them."
        )
    if model.pretrained is not None and model.config:
        raise UserError("model.config cannot change a model that model.pretrained names; remove model.config.")
    if data.source in ("text", "jsonl", "parquet") and not data.paths:
        raise UserError(f"data.source={data.source} needs data.paths, which is empty; list the files.")
    if data.source in ("python-stdlib", "hub") and data.paths:
        raise UserError(
            f"data.paths is set, but data.source={data.source} reads no files; "
            "set data.source to text, jsonl or parquet, or remove data.paths."
        )
    if (data.source == "hub") != (data.hub_name is not None):
        raise UserError(f"data.source={data.source} and data.hub_name={data.hub_name}: hub needs a name, others none.")


def _validate_parallel(config: RunConfig) -> None:
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


def _validate_schedule(config: RunConfig) -> None:
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


def _validate_world(config: RunConfig, world: World) -> None:
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


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"{override!r} is not an override; write key.sub=value, for example optimizer.lr=1e-3.")
    node = values
    *parents, leaf = key.split(".")
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"{override!r}: {parent} is a value, not a section; write {parent}=value.")
    try:
        node[leaf] = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not YAML ({_one_line(error)}); quote it.") from None


def _describe(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{_nearest(location)}"
    if problem["type"] == "missing":
        return f"{key} is missing; set it in the file or with {key}=VALUE."
    if problem["type"] == "model_type":
        return f"{key}={problem['input']!r} is a value, but {key} is a section of settings."
    message = problem["msg"]
    return f"{key}={problem['input']!r}: {message[:1].lower()}{message[1:]}."


def _nearest(location: list[str]) -> str:
    model: type[BaseModel] = RunConfig
    for part in location[:-1]:
        inner = _section_of(model, part)
        if inner is None:
            return ""
        model = inner
    names = [field.alias or name for name, field in model.model_fields.items()]
    close = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {'.'.join([*location[:-1], close[0]])}?"
    section = ".".join(location[:-1])
    return f"; {section or 'the top level'} has {', '.join(names)}."


def _section_of(model: type[BaseModel], part: str) -> type[BaseModel] | None:
    for name, field in model.model_fields.items():
        if part in (name, field.alias):
            kinds = (field.annotation, *get_args(field.annotation))
            return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
