"""Which direction of a metric is better, as the run's task said, and the best of its values. Imports no torch."""

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from trainer.files.atomic_files import write_atomically

DIRECTIONS_NAME = "metric_directions.json"
_AVERAGED = "ema_"

Better = Literal["lower", "higher"]


def record_directions(run_dir: Path, directions: Mapping[str, Better]) -> None:
    """Write down which direction of each metric of an evaluation is better, for whoever reads metrics.jsonl.

    Args:
        run_dir: the run's folder.
        directions: by the metric's name, without ``eval/``; what earlier evaluations had besides stays.
    """
    known = read_directions(run_dir)
    both = {**known, **directions}
    if both != known:
        # Training does not depend on it.
        with contextlib.suppress(OSError):
            write_atomically(run_dir / DIRECTIONS_NAME, json.dumps(both, indent=2) + "\n")


def read_directions(run_dir: Path) -> dict[str, Better]:
    """What was written down; empty where nothing was, as by an earlier release."""
    try:
        values = json.loads((run_dir / DIRECTIONS_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def better_direction(run_dir: Path, metric: str) -> Better | None:
    """Which direction of a metric, named without ``eval/``, is better; None where nobody has said so."""
    known = read_directions(run_dir)
    name = metric.removeprefix(_AVERAGED)
    # Of an earlier release, too.
    return known.get(metric) or known.get(name) or ("lower" if name.rpartition("/")[2] == "loss" else None)


def best_point(points: Iterable[tuple[int, float]], better: Better | None) -> tuple[int, float] | None:
    """Step and value of the best of finite values, of equal ones the first; None where none is known to be."""
    if better is None:
        return None
    sign = 1.0 if better == "lower" else -1.0
    return min(points, key=lambda point: (sign * point[1], point[0]), default=None)
