"""Settings as earlier releases spelt them, in files of a user's own and in what old runs were frozen with."""

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sharding.ranks.errors import UserError

_ENGINE, _BACKEND = "parallel.engine", "parallel.backend"
# What each value of parallel.engine was under the backends that it went with.
_BACKENDS_OF_ENGINES: dict[Any, dict[Any, str]] = {
    "bucketed": {"torch": "bucketed", "bucketed": "bucketed"},
    "fully_shard": {"torch": "torch", "deepspeed": "deepspeed", "accelerate": "accelerate"},
}


def with_present_spelling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with those of earlier releases under their present names.

    Raises:
        UserError: ``parallel.engine`` has a value that it never had, or contradicts ``parallel.backend``.
    """
    parallel = values.get("parallel")
    if not isinstance(parallel, Mapping) or "engine" not in parallel:
        return dict(values)
    engine, backend = parallel["engine"], parallel.get("backend", "torch")
    backends = _BACKENDS_OF_ENGINES.get(engine, {}) if isinstance(engine, str) else {}
    if not backends:
        raise UserError(
            f"{_ENGINE}={engine} is no engine of earlier releases, which had bucketed and fully_shard; remove it, and "
            f"set {_BACKEND}."
        )
    if not isinstance(backend, str) or backend not in backends:
        raise UserError(
            f"{_ENGINE}={engine}, which is the earlier spelling of {_BACKEND}={backends['torch']}, contradicts "
            f"{_BACKEND}={backend}; remove {_ENGINE}."
        )
    present = {key: value for key, value in parallel.items() if key != "engine"}
    return {**values, "parallel": {**present, "backend": backends[backend]}}


def overrides_with_present_spelling(overrides: Sequence[str]) -> list[str]:
    """``key=value`` changes under their present names; what was the default of a setting that is gone is left out."""
    present = {f"{_ENGINE}=bucketed": f"{_BACKEND}=bucketed", f"{_ENGINE}=fully_shard": ""}
    return [spelt for override in overrides if (spelt := present.get(override, override))]


def present_name(key: str) -> str:
    """The present name of a setting that may have an earlier one."""
    return _BACKEND if key == _ENGINE else key


def forget_replaced(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Take earlier spellings out of a file's settings, in place, where an override replaces what they mean."""
    parallel = values.get("parallel")
    if isinstance(parallel, dict) and any(override.partition("=")[0] == _BACKEND for override in overrides):
        parallel.pop("engine", None)


def note_earlier_spelling(values: Mapping[str, Any], source: str) -> None:
    """Tell whoever wrote an earlier spelling of the present one: once in a process, and on one rank.

    Args:
        values: settings as they were written.
        source: their file.
    """
    parallel = values.get("parallel")
    if not isinstance(parallel, Mapping) or "engine" not in parallel:
        return
    # Who names even these has not written the file: all settings are in what a release has frozen.
    if not {"offload_parameters", "pipeline"} <= parallel.keys():
        backend = with_present_spelling(values)["parallel"]["backend"]
        _note(f"{source}: {_ENGINE}={parallel['engine']} is read as {_BACKEND}={backend}; write that.")


@functools.cache
def _note(sentence: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {sentence}", file=sys.stderr)
