"""Attempts of a run: when each started and ended, where it began, and what it changed."""

import json
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from trainer.config.frozen_config import flatten

_CONTINUES = re.compile(r"INFO continuing after step (\d+)$", re.MULTILINE)
_MODEL = re.compile(r"INFO (\S.* parameters, .*)$", re.MULTILINE)
_TIME = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} ", re.MULTILINE)
_HEAD_CHARACTERS = 20_000
_TAIL_CHARACTERS = 20_000


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Attributes:
        number: from 1.
        provenance: its provenance.json; empty where that is missing.
        config: its configuration, flat; empty where that is missing.
        began_after: step of the checkpoint it continued from, 0 for a fresh start; None where its log does not tell.
        model: what the log says of the model and how it is sharded.
        duration_s: from its provenance to the last line of rank 0's log; None where either is missing.
    """

    number: int
    provenance: dict[str, Any]
    config: dict[str, Any]
    began_after: int | None
    model: str
    duration_s: float | None


def read_attempts(run_dir: Path) -> list[Attempt]:
    """All attempts that left a provenance file or a log folder, in order."""
    numbers = {1} if (run_dir / "config.yaml").exists() else set()
    for path in [*run_dir.glob("provenance.attempt-*.json"), *(run_dir / "logs").glob("attempt-*")]:
        digits = path.name.removesuffix(".json").rpartition("-")[2]
        if digits.isdecimal():
            numbers.add(int(digits))
    return [_read_attempt(run_dir, number) for number in sorted(numbers)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is none."""
    try:
        values = json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; empty where there is none. Not checked: the run may be of another version."""
    try:
        values = yaml.safe_load(path.read_text(errors="replace"))
    except (OSError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _read_attempt(run_dir: Path, number: int) -> Attempt:
    suffix = "" if number == 1 else f".attempt-{number}"
    provenance = read_json(run_dir / f"provenance{suffix}.json")
    head, tail = _head_and_tail(run_dir / "logs" / f"attempt-{number}" / "rank-0.log")
    continues, model = _CONTINUES.search(head), _MODEL.search(head)
    began_after = int(continues[1]) if continues else 0 if model else None
    duration = _duration(str(provenance.get("time", "")), tail)
    return Attempt(
        number=number,
        provenance=provenance,
        config=flatten(read_yaml(run_dir / f"config{suffix}.yaml")),
        began_after=began_after,
        model=model[1] if model else "",
        duration_s=None if duration is None else duration.total_seconds(),
    )


def _duration(started: str, log_tail: str) -> timedelta | None:
    """Both times are the local ones of the same machine."""
    times = _TIME.findall(log_tail)
    try:
        start = datetime.fromisoformat(started).replace(tzinfo=None)
    except ValueError:
        return None
    duration = datetime.fromisoformat(times[-1]) - start if times else None
    return duration if duration is None or duration >= timedelta(0) else None


def _head_and_tail(path: Path) -> tuple[str, str]:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_CHARACTERS)
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_CHARACTERS))
            tail = file.read()
    except OSError:
        return "", ""
    return head.decode(errors="replace"), tail.decode(errors="replace")
