"""How two configurations of a run differ, and in which settings a continued run must not. Imports no torch."""

from collections.abc import Iterable, Iterator
from typing import Any

from sharding.strict_model import idle_settings
from trainer.config.schema import RunConfig

_FROZEN_KEYS = (
    *("task", "model", "data", "seed", "optimizer", "schedule"),
    *("batch.global_size", "precision.compute", "precision.fp8_recipe"),
)
# These change neither arithmetic nor what a checkpoint has behind it: where modules of one's own and the cache lie, how
# fast it is made, which samples are skipped from here on, when the curve ends, and what is averaged beside training.
_FREE_KEYS = (
    *("task.folder", "model.folder", "data.folder", "data.cache_dir", "data.num_workers", "data.skip_samples"),
    *("schedule.total_steps", "optimizer.ema_decay"),
)


def frozen_differences(frozen: RunConfig, wanted: RunConfig) -> list[str]:
    """What keeps a run from going on with other settings, as ``key: frozen VALUE, now VALUE``; empty where nothing.

    What had no effect and has none now is no difference: an earlier release may have let it stand.
    """
    idle = {setting.key for setting in idle_settings(frozen)} & {setting.key for setting in idle_settings(wanted)}
    return [
        f"{key}: frozen {old}, now {new}"
        for key, old, new in _differences(frozen, wanted)
        if _is_in(key, _FROZEN_KEYS) and key not in _FREE_KEYS and not _is_in(key, idle)
    ]


def all_differences(one: RunConfig, other: RunConfig) -> list[str]:
    """Every setting that differs, as ``key: VALUE and VALUE``."""
    return [f"{key}: {value} and {others}" for key, value, others in _differences(one, other)]


def _differences(one: RunConfig, other: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    values, others = flatten(one.model_dump(mode="json")), flatten(other.model_dump(mode="json"))
    for key in sorted(values.keys() | others.keys()):
        if values.get(key) != others.get(key):
            yield key, values.get(key), others.get(key)


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
