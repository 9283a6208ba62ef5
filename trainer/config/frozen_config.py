"""How two configurations of a run differ, and in which settings a continued run must not. Imports no torch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from sharding.strict_model import idle_settings
from trainer.config.checkpoint import CHANGEABLE
from trainer.config.schema import RunConfig
from trainer.config.stages import stages_of

_FROZEN_KEYS = (
    *("task", "model", "data", "seed", "optimizer", "schedule", "prune", "distill", "stages"),
    *("batch.global_size", "precision.compute", "precision.fp8_recipe"),
)
# These change neither arithmetic nor what a checkpoint has behind it: where modules of one's own and the cache lie, how
# fast it is made, which samples are skipped from here on, when the curve ends, and what is averaged beside training.
# What a teacher is, its weights say: see trainer.distillation.identity.
_FREE_KEYS = (
    *("task.folder", "model.folder", "data.folder", "data.cache_dir", "data.num_workers", "data.skip_samples"),
    *("schedule.total_steps", "optimizer.ema_decay", "distill.teacher"),
)


@dataclass(frozen=True)
class Change:
    """A setting that differs between two configurations of a run.

    Attributes:
        setting: its dotted name.
        old: what it was.
        new: what it is.
        stage: the stage that it is of; empty where it is the run's.
    """

    setting: str
    old: Any
    new: Any
    stage: str = ""

    @property
    def key(self) -> str:
        """What to call it."""
        return f"{self.setting} of stage {self.stage}" if self.stage else self.setting

    @property
    def can_be_allowed(self) -> bool:
        """Whether ``checkpoint.allow_changes`` may list it."""
        return _is_in(self.setting, CHANGEABLE)


def frozen_differences(frozen: RunConfig, wanted: RunConfig) -> list[Change]:
    """What keeps a run from going on with other settings, those left out that it is allowed to change.

    What had no effect and has none now is no difference: an earlier release may have let it stand.
    """
    free = (*_FREE_KEYS, *wanted.checkpoint.allow_changes)
    return [
        change
        for change in _changes(frozen, wanted)
        if _is_in(change.setting, _FROZEN_KEYS) and not _is_in(change.setting, free)
    ]


def allowed_changes(frozen: RunConfig, wanted: RunConfig) -> list[Change]:
    """What a run does otherwise from now on, since it is allowed to."""
    return [change for change in _changes(frozen, wanted) if _is_in(change.setting, wanted.checkpoint.allow_changes)]


def _changes(frozen: RunConfig, wanted: RunConfig) -> Iterator[Change]:
    """What differs and has an effect in either, stage by stage where there are some."""
    if not frozen.stages and not wanted.stages:
        yield from _with_effect(frozen, wanted)
        return
    names, others = ([stage.name for stage in config.stages] for config in (frozen, wanted))
    if not names or names != others[: len(names)]:
        yield Change("stages", names or "none", others or "none")
        return
    # These are the stages' own below.
    for change in _differences(frozen, wanted):
        if change.setting != "stages" and not _is_in(change.setting, ("data", "batch")):
            yield change
    pairs = list(zip(stages_of(frozen), stages_of(wanted), strict=False))
    for index, (old, new) in enumerate(pairs):
        for change in _with_effect(old.config, new.config):
            is_own = old.has_own_schedule or new.has_own_schedule
            if (
                _is_in(change.setting, ("data", "batch"))
                or (is_own and _is_in(change.setting, ("schedule",)))
                or (change.setting == "optimizer.lr" and frozen.stages[index].lr != wanted.stages[index].lr)
            ):
                yield replace(change, stage=old.name)
        if old.has_own_schedule != new.has_own_schedule:
            was, now = ("own" if stage.has_own_schedule else "the run's" for stage in (old, new))
            yield Change("schedule", was, now, old.name)
        # What comes after it begins where it ends; the last one may grow, as a run may.
        may_change = index == len(names) - 1 and (len(others) == len(names) or new.end_step >= old.end_step)
        if old.config.num_steps != new.config.num_steps and not may_change:
            yield Change("stages", f"{old.config.num_steps} steps", f"{new.config.num_steps} steps", old.name)


def _with_effect(frozen: RunConfig, wanted: RunConfig) -> Iterator[Change]:
    idle = {setting.key for setting in idle_settings(frozen)} & {setting.key for setting in idle_settings(wanted)}
    for change in _differences(frozen, wanted):
        if not _is_in(change.setting, idle):
            yield change


def all_differences(one: RunConfig, other: RunConfig) -> list[str]:
    """Every setting that differs, as ``key: VALUE and VALUE``."""
    return [f"{change.key}: {change.old} and {change.new}" for change in _differences(one, other)]


def _differences(one: RunConfig, other: RunConfig) -> Iterator[Change]:
    values, others = flatten(one.model_dump(mode="json")), flatten(other.model_dump(mode="json"))
    for key in sorted(values.keys() | others.keys()):
        if values.get(key) != others.get(key):
            yield Change(key, values.get(key), others.get(key))


def _is_in(key: str, settings: Iterable[str]) -> bool:
    """Whether a setting is one of several settings or sections, or lies in one."""
    return any(key == setting or key.startswith(f"{setting}.") for setting in settings)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
