"""Stages: parts of one run with data, schedule and batch of their own; imports no torch."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sharding.ranks.errors import UserError
from sharding.strict_model import StrictModel, idle_settings
from trainer.config.data import DataConfig, SourceConfig
from trainer.config.rows_rules import with_kind_of_samples
from trainer.config.stage_section import StageConfig

if TYPE_CHECKING:
    from trainer.config.schema import RunConfig

_SOURCE = frozenset({*SourceConfig.model_fields, "mixture"})
# A stage that names one of these takes none of the settings on the right from the run's section.
_REPLACES = {"source": _SOURCE, "mixture": _SOURCE, "format": frozenset({"document_mask"})}
_OF_ALL_STAGES = ("tokenizer", "vocab_size", "mask_token", "cache_dir")


@dataclass(frozen=True)
class Stage:
    """A stage as a run would be that has nothing else; of a run without stages the one that it is.

    Attributes:
        index: its place, from 0.
        name: its name; empty in a run without stages.
        config: an ordinary configuration, without stages.
        first_step: steps of the run before it.
        has_own_schedule: whether its schedule is over its own steps, and not over those of a run of several stages.
    """

    index: int
    name: str
    config: "RunConfig"
    first_step: int
    has_own_schedule: bool

    @property
    def end_step(self) -> int:
        """The last step of it, counted in the run."""
        return self.first_step + self.config.num_steps

    @property
    def label(self) -> str:
        """What to call it in an error."""
        return f"stage {self.name}"


def stages_of(config: "RunConfig") -> list[Stage]:
    """The stages of a run in their order; of a run without, the one that it is."""
    if not config.stages:
        return [Stage(0, "", config, 0, has_own_schedule=True)]
    stages, first_step = [], 0
    for index, settings in enumerate(config.stages):
        with errors_of_stage(settings.name):
            stage = Stage(index, settings.name, _alone(config, settings), first_step, settings.schedule is not None)
        stages.append(stage)
        first_step += stage.config.num_steps
    return stages


def stage_of_step(stages: list[Stage], step: int) -> Stage:
    """The stage that a step, counted from 1, belongs to; the last one for steps beyond, the first one for step 0."""
    return next((stage for stage in stages[:-1] if step <= stage.end_step), stages[-1])


def config_of_step(config: "RunConfig", step: int) -> "RunConfig":
    """The configuration of the stage that a step belongs to; of a run without stages its own."""
    return stage_of_step(stages_of(config), step).config if config.stages else config


def widest_config(config: "RunConfig") -> "RunConfig":
    """The configuration of the stage with the longest sequences, for which the model must have positions."""
    return max(stages_of(config), key=lambda stage: stage.config.data.sequence_length).config


def describe_stage(stage: Stage, num_stages: int) -> str:
    """A stage in one line: its place, steps and tokens."""
    config = stage.config
    tokens = f"{config.tokens_per_step:,} tokens a step, {config.tokens_per_step * config.num_steps:,} in all"
    return (
        f"stage {stage.index + 1} of {num_stages}, {stage.name}: steps {stage.first_step + 1:,} to {stage.end_step:,}, "
        f"{tokens}"
    )


def num_positions_after(config: "RunConfig", step: int) -> int:
    """Token positions, or samples where there are no tokens, of all steps of a run after one."""
    stages = stages_of(config)
    return sum(
        (stage.end_step - max(step, stage.first_step)) * stage.config.tokens_per_step
        for stage in stages
        if stage.end_step > step
    )


@contextlib.contextmanager
def errors_of_stage(name: str) -> Iterator[None]:
    """Put the name of a stage before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"stage {name}: {error}" if name else str(error)) from None


def validate_stages(config: "RunConfig") -> None:
    """The rules among stages; each is then held to those of a run.

    Raises:
        UserError: one is broken.
    """
    names = [stage.name for stage in config.stages]
    for settings in config.stages:
        if names.count(settings.name) > 1:
            raise UserError(f"stages: {names.count(settings.name)} are named {settings.name}; give each its own name.")
        given = [key for key in ("steps", "tokens") if getattr(settings, key) is not None]
        if len(given) != 1:
            raise UserError(
                f"stage {settings.name} has a length in steps or in tokens, but {' and '.join(given) or 'neither'} is "
                "set: set exactly one of them."
            )
        own = [key for key in _OF_ALL_STAGES if key in settings.data.model_fields_set]
        if own:
            raise UserError(
                f"stage {settings.name}: data.{own[0]} is one for all stages of a run; set it at the top level."
            )
        _check_tokens(config, settings)
    _validate_budget(config)
    _validate_monitor(config)
    if config.faults.spike_policy == "rollback":
        raise UserError(
            "faults.spike_policy=rollback returns to a checkpoint, which may be of the stage before, whose samples are "
            "others; use faults.spike_policy=skip in a run with stages."
        )
    if config.distill.top_k is not None:
        raise UserError(
            f"distill.top_k={config.distill.top_k} keeps what the teacher says of each sample by its number, and each "
            "stage numbers samples of its own; remove it, and the teacher is asked in each step."
        )


def _check_tokens(config: "RunConfig", settings: StageConfig) -> None:
    alone = _alone(config, settings)
    data = alone.data
    if data.has_rows or data.source == "factory":
        what = "data.source=factory" if data.source == "factory" else "data.format=rows"
        raise UserError(
            f"stage {settings.name}: {what} is not for stages, whose samples are packed tokens; train on them in a run "
            "of their own with checkpoint.from."
        )
    if settings.tokens is not None and settings.tokens < alone.tokens_per_step:
        raise UserError(
            f"stage {settings.name}: tokens={settings.tokens} is less than one batch of batch.global_size="
            f"{alone.batch.global_size} x data.sequence_length={data.sequence_length} = {alone.tokens_per_step}; "
            f"set it to {alone.tokens_per_step} at least, or lower batch.global_size in this stage."
        )


def _validate_budget(config: "RunConfig") -> None:
    given = [f"{key}={getattr(config, key)}" for key in ("steps", "tokens", "epochs") if getattr(config, key)]
    if given:
        total = sum(settings.num_steps(config.batch, config.data) for settings in config.stages)
        raise UserError(
            f"{given[0]} is set beside stages, whose lengths come to {total} steps; remove it (on the command line: "
            f"{given[0].partition('=')[0]}=null), or change the length of a stage."
        )


def _validate_monitor(config: "RunConfig") -> None:
    """Check that what is compared over stages is one thing: each holds out documents of its own."""
    evaluation = config.evaluation
    in_set = evaluation.monitor.rpartition("/")[0].removeprefix("ema_") in {one.name for one in evaluation.sets}
    keys = {"evaluation.patience": evaluation.patience, "checkpoint.keep_best": config.checkpoint.keep_best}
    for key, value in keys.items():
        if value and not in_set:
            raise UserError(
                f"{key}={value} compares evaluation.monitor={evaluation.monitor} over all steps, but each stage holds "
                "out data of its own; name a metric of evaluation.sets, such as SET/loss, or set it to 0."
            )


def _alone(config: "RunConfig", settings: StageConfig) -> "RunConfig":
    own: dict[str, StrictModel] = {"data": settings.data, "batch": settings.batch}
    if settings.schedule is not None:
        own["schedule"] = settings.schedule
    changes: dict[str, Any] = {"stages": (), "steps": settings.num_steps(config.batch, config.data)}
    changes |= {key: _merged(getattr(config, key), section) for key, section in own.items()}
    if settings.lr is not None:
        changes["optimizer"] = config.optimizer.model_copy(update={"lr": settings.lr})
    alone = config.model_copy(update=changes)
    # What the run's section says and does not go with what the stage says stays behind.
    idle = [setting.key.split(".") for setting in idle_settings(alone) if setting.changed is not None]
    for key, section in own.items():
        names = {path[1] for path in idle if path[0] == key and len(path) > 1} - section.model_fields_set
        if names:
            merged = getattr(alone, key)
            alone = alone.model_copy(update={key: merged.model_copy(update=_defaults(type(merged), names))})
    data = _with_kind(alone.data, settings.data.model_fields_set, alone.task.name)
    return alone if data is alone.data else alone.model_copy(update={"data": data})


def _with_kind(data: DataConfig, named: set[str], task_name: str) -> DataConfig:
    """What follows from the kind of a stage's samples, which may be another than that of the run's section."""
    data = with_kind_of_samples(data, task_name)
    if not data.has_messages:
        # They say how conversations become samples.
        return data.model_copy(update=_defaults(DataConfig, {"chat_template", "packing"} - named))
    if named & {"source", "mixture", "format"} and "document_mask" not in named:
        return data.model_copy(update={"document_mask": True})
    return data


def _merged(section: StrictModel, own: StrictModel) -> StrictModel:
    """A section of the run with a stage's own settings."""
    named = own.model_fields_set
    replaced = {other for name in named for other in _REPLACES.get(name, ())} - named
    return section.model_copy(update=_defaults(type(section), replaced) | {name: getattr(own, name) for name in named})


def _defaults(kind: type[StrictModel], names: Iterable[str]) -> dict[str, Any]:
    return {name: kind.model_fields[name].default for name in names if name in kind.model_fields}
