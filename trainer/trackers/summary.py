"""What is left of a run at a glance: final and best losses, tokens, time, outcome."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sharding.ranks.errors import EXIT_BAD_INPUT, EXIT_FINISHED, EXIT_STOPPED

_OUTCOMES = {EXIT_FINISHED: "finished", EXIT_STOPPED: "stopped", EXIT_BAD_INPUT: "bad_input"}


@dataclass
class RunSummary:
    """Gathers the summary from the lines of metrics.jsonl, in order."""

    _last: dict[str, Any] = field(default_factory=dict)
    _best: tuple[float, int] | None = None
    _started_at: float = field(default_factory=time.monotonic)

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take one step's metrics into account."""
        self._last |= {name: value for name, value in metrics.items() if value is not None}
        loss = metrics.get("eval/loss")
        if loss is not None and (self._best is None or loss < self._best[0]):
            self._best = (loss, step)

    def values(self, exit_code: int) -> dict[str, Any]:
        """The summary; what was never measured is left out.

        Args:
            exit_code: how the attempt ended.
        """
        best_loss, best_step = self._best or (None, None)
        values = {
            "summary/final_loss": self._last.get("train/loss"),
            "summary/final_eval_loss": self._last.get("eval/loss"),
            "summary/best_eval_loss": best_loss,
            "summary/best_eval_step": best_step,
            "summary/tokens": self._last.get("train/tokens"),
            "summary/attempt_wall_time_s": time.monotonic() - self._started_at,
            "summary/outcome": _OUTCOMES.get(exit_code, "failed"),
        }
        return {name: value for name, value in values.items() if value is not None}
