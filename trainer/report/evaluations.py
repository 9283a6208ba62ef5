"""What a run's evaluations came to, by the metric that it is judged by. Imports no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.metrics.best import Better, best_point, better_direction

MONITOR_KEY = "evaluation.monitor"


@dataclass(frozen=True)
class Judged:
    """What a run's evaluations came to.

    Attributes:
        metric: what the run is judged by, without ``eval/``.
        better: which direction of it is better; None where nobody has said so.
        best: its best value; None where there is none, or the direction is not known.
        best_step: step of that.
        last: its last value.
        last_step: step of that.
    """

    metric: str
    better: Better | None
    best: float | None = None
    best_step: int | None = None
    last: float | None = None
    last_step: int | None = None


def monitored(config: Mapping[str, Any]) -> str:
    """What a run is judged by; its configuration is flat, and may be of an earlier release."""
    return str(config.get(MONITOR_KEY) or "loss")


def judge(run_dir: Path, metric: str, points: Iterable[tuple[int, float]]) -> Judged:
    """Judge a run by step and finite value of each of its evaluations."""
    better, known = better_direction(run_dir, metric), list(points)
    best_step, best = best_point(known, better) or (None, None)
    last_step, last = known[-1] if known else (None, None)
    return Judged(metric, better, best, best_step, last, last_step)
