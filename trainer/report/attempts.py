"""Attempts of a run: when each started and ended, where it began, and what it changed."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.ranks.errors import UserError
from trainer.config.earlier_spellings import with_present_spelling
from trainer.config.frozen_config import flatten
from trainer.config.yaml_files import YamlError, parse_yaml
from trainer.metrics.goodput import AttemptLedger, read_ledgers
from trainer.run_folder.attempt_record import read_attempt_record


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Attributes:
        number: from 1.
        provenance: its provenance.json; empty where that is missing.
        config: its configuration, flat; empty where that is missing.
        began_after: step of the checkpoint it continued from, 0 for a fresh start; None where it did not come so far.
        model: the model and how it is sharded, for people; empty where it did not come so far.
        duration_s: what its ledger accounts for; None where there is none.
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
    ledgers = read_ledgers(run_dir)
    return [_read_attempt(run_dir, number, ledgers) for number in sorted(numbers)]


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
        values = parse_yaml(path.read_text(errors="replace"))
    except (OSError, YamlError):
        return {}
    if not isinstance(values, dict):
        return {}
    # Where it was spelt otherwise, nothing has changed; what is no configuration is shown as it is.
    with contextlib.suppress(UserError):
        values = with_present_spelling(values)
    return values


def _read_attempt(run_dir: Path, number: int, ledgers: list[AttemptLedger]) -> Attempt:
    suffix = "" if number == 1 else f".attempt-{number}"
    record = read_attempt_record(run_dir / "logs" / f"attempt-{number}")
    own = [ledger for ledger in ledgers if ledger.attempt == number]
    # An attempt of an earlier release has its ledger alone, which says where it went back to, if that is earlier.
    known = next((ledger.began_after for ledger in own), None)
    return Attempt(
        number=number,
        provenance=read_json(run_dir / f"provenance{suffix}.json"),
        config=flatten(read_yaml(run_dir / f"config{suffix}.yaml")),
        began_after=record.began_after if record is not None else known,
        model=record.model if record is not None else "",
        duration_s=sum(ledger.duration_s for ledger in own) if own else None,
    )
