"""Starts of races, one launch of ranks after another, and how long those take that are still to come."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.measure.driver import measure_on_ranks
from benchmarks.presentation.result_files import RESULTS, last_result, read_rows
from benchmarks.scaling.plan import ScalingAssignment
from sharding.ranks.errors import UserError

Rows = Sequence[Mapping[str, Any]]
_MEMORY = ", memory"


def first_start(raw: Path, setup: Mapping[str, Any]) -> int:
    """The number of the first start that is to be added to a result.

    Args:
        raw: the result.
        setup: what must be as it was.

    Raises:
        UserError: there is no such result, or it was measured otherwise.
    """
    rows = read_rows(raw) if raw.is_file() else []
    if not rows or rows[0].get("kind") != "header":
        raise UserError(f"--add-to {raw}: there is no result to add starts to.")
    before = rows[0]["setup"]
    differences = [f"{key} {before.get(key)}, now {value}" for key, value in setup.items() if before.get(key) != value]
    if differences:
        raise UserError(f"--add-to {raw}: it was measured otherwise: {'; '.join(differences)}; give the same options.")
    return 1 + max((row["start"] for row in rows if "start" in row), default=-1)


def launch_all(assignments: Sequence[ScalingAssignment], raw: Path) -> int:
    """Run everything, and say before each launch how long the rest takes; returns the exit status."""
    known = durations(raw)
    for index, assignment in enumerate(assignments):
        left = [_label(one) for one in assignments[index:]]
        print(estimate(left, known), flush=True)
        count, part = assignment.plan.num_ranks, "memory" if assignment.measures_memory else "race"
        race, start = assignment.plan.label, assignment.start
        status = measure_on_ranks("benchmarks.scaling.rank", assignment, count, raw, race=race, start=start, part=part)
        if status:
            return status
        known = durations(raw)
    return 0


def durations(raw: Path) -> dict[str, float]:
    """Seconds that a start of each race takes, by its label: in this result, else in the last one that is like it."""
    own = read_rows(raw)
    before = last_result(raw, [raw.parent.parent, RESULTS])
    earlier = read_rows(before) if before else []
    if earlier and any(earlier[0].get(key) != own[0].get(key) for key in ("num_pairs", "num_warmup")):
        earlier = []
    return _durations(earlier) | _durations(own)


def estimate(left: Sequence[str], known: Mapping[str, float]) -> str:
    """A line that says how long the launches take that are to come.

    Args:
        left: their races' labels.
        known: seconds by label; one that is not there is taken for the mean of the others.
    """
    if not known:
        return f"{len(left)} launches to come; how long they take is known when the first of them has ended"
    seconds = sum(known.get(label, mean(known.values())) for label in left)
    return f"{len(left)} launches to come, about {max(1, round(seconds / 60))} minutes"


def _label(assignment: ScalingAssignment) -> str:
    return assignment.plan.label + (_MEMORY if assignment.measures_memory else "")


def _durations(rows: Rows) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.get("kind") == "end" and not row["exit_code"] and "elapsed_s" in row and "race" in row:
            label = row["race"] + (_MEMORY if row.get("part") == "memory" else "")
            found.setdefault(label, []).append(row["elapsed_s"])
    return {label: median(seconds) for label, seconds in found.items()}


def write_assignments(assignments: Sequence[ScalingAssignment], raw: Path) -> tuple[Path, list[str]]:
    """A file for each launch, for Slurm to start; returns their folder, and their names without ending in order.

    A name ends in the number of ranks.
    """
    folder = raw.with_suffix(".assignments").absolute()
    folder.mkdir()
    names = [f"{index}_{assignment.plan.num_ranks}" for index, assignment in enumerate(assignments)]
    for name, assignment in zip(names, assignments, strict=True):
        (folder / f"{name}.json").write_text(json.dumps(asdict(assignment)))
    return folder, names
