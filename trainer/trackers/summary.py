"""What is left of a run at a glance: final and best evaluation, tokens, time, outcome."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sharding.ranks.errors import EXIT_BAD_INPUT, EXIT_FINISHED, EXIT_STOPPED
from trainer.metrics.best import Better, best_point

_OUTCOMES = {EXIT_FINISHED: "finished", EXIT_STOPPED: "stopped", EXIT_BAD_INPUT: "bad_input"}


@dataclass
class RunSummary:
    """Gathers the summary from the lines of metrics.jsonl, in order.

    Attributes:
        monitor: the metric of the evaluation that the run is judged by, without ``eval/``.
    """

    monitor: str = "loss"
    _last: dict[str, Any] = field(default_factory=dict)
    _points: list[tuple[int, float]] = field(default_factory=list)
    _started_at: float = field(default_factory=time.monotonic)

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take one step's metrics into account."""
        self._last |= {name: value for name, value in metrics.items() if value is not None}
        value = metrics.get(f"eval/{self.monitor}")
        if value is not None:
            self._points.append((step, value))

    def values(self, exit_code: int, better: Better | None) -> dict[str, Any]:
        """The summary; what was never measured is left out.

        Args:
            exit_code: how the attempt ended.
            better: which direction of ``monitor`` is better; None where that is not known, and so no best value.
        """
        best_step, best = best_point(self._points, better) or (None, None)
        values = {
            "summary/final_loss": self._last.get("train/loss"),
            f"summary/final_eval_{self.monitor}": self._last.get(f"eval/{self.monitor}"),
            f"summary/best_eval_{self.monitor}": best,
            "summary/best_eval_step": best_step,
            "summary/tokens": self._last.get("train/tokens"),
            "summary/attempt_wall_time_s": time.monotonic() - self._started_at,
            "summary/outcome": _OUTCOMES.get(exit_code, "failed"),
        }
        return {name: value for name, value in values.items() if value is not None}
