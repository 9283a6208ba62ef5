"""metrics.jsonl: each logged step once, whatever was rolled back. Imports no torch."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sharding.ranks.errors import UserError

Metrics = dict[str, float | int | None]

# Of a classification of a thousand classes, with scores of each.
_LONGEST_LINE_BYTES = 2**20


class MetricsFile:
    """metrics.jsonl: one JSON object per logged step, each step once."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Open the file for appending; lines beyond ``last_step`` move to metrics.discarded.jsonl.

        They belong to steps that an earlier attempt took after the checkpoint from which this one continues.
        """
        if path.exists():
            _discard_after(path, last_step)
        # No buffer: a killed run loses no finished line.
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, metrics: Metrics) -> None:
        """Append one step's metrics; numbers that are not finite become null.

        Raises:
            UserError: the disk is full, say.
        """
        line = (json.dumps({"step": step} | finite_or_none(metrics)) + "\n").encode()
        try:
            # The next attempt takes out a line that is not complete.
            reason = None if self._file.write(line) == len(line) else os.strerror(errno.ENOSPC)
        except OSError as error:
            reason = error.strerror
        if reason is not None:
            raise UserError(
                f"{self._file.name} cannot be written: {reason}; free some space, then run again to continue from the "
                "last checkpoint."
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[Metrics]:
    """All lines of a metrics.jsonl, which may still be growing; none where it is not there."""
    try:
        return list(_whole_lines(path.read_bytes().splitlines()))
    except FileNotFoundError:
        return []


def last_metrics(path: Path) -> dict[str, Any]:
    """The newest complete line of a metrics.jsonl, which may be growing; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_LINE_BYTES))
            return next(_whole_lines(reversed(file.read().splitlines())), {})
    except OSError:
        return {}


def _whole_lines(lines: Iterable[bytes]) -> Iterator[Metrics]:
    for line in lines:
        # The first may be the end of one, the last half written.
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            if isinstance(values, dict):
                yield values


def finite_or_none(metrics: Metrics) -> Metrics:
    """The metrics with None in place of NaN and infinity, which JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }


def _discard_after(path: Path, last_step: int) -> None:
    kept: list[str] = []
    discarded: list[str] = []
    for line in path.read_text().splitlines():
        (kept if _step_of(line) <= last_step else discarded).append(line + "\n")
    if not discarded:
        return
    with path.with_name("metrics.discarded.jsonl").open("a") as file:
        file.writelines(discarded)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _step_of(line: str) -> float:
    try:
        values: dict[str, Any] = json.loads(line)
        return float(values["step"])
    except (ValueError, KeyError):
        # The last line of a process that was killed while writing.
        return math.inf
