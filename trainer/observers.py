"""Those who watch a run on rank 0: the console and the trackers. On other ranks nobody watches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.console import Console
from trainer.metrics import Metrics
from trainer.trackers.composite import Trackers


@dataclass(frozen=True)
class Observers:
    """Passes news on to whoever is there.

    Attributes:
        metrics_path: where metrics.jsonl is written.
        console: progress for a person; None on all ranks but the first.
        trackers: wandb and others; None on all ranks but the first.
    """

    metrics_path: Path
    console: Console | None = None
    trackers: Trackers | None = None

    def start(self, step: int) -> None:
        """Training begins after ``step`` finished steps; metrics.jsonl has no line beyond it."""
        if self.console is not None:
            self.console.start(step)
        if self.trackers is not None:
            self.trackers.start(step)

    def advance(self, step: int) -> None:
        """A step is done that is not logged."""
        if self.console is not None:
            self.console.advance(step)

    def log(self, step: int, metrics: Metrics) -> None:
        """A step's metrics are known, and in metrics.jsonl."""
        if self.console is not None:
            self.console.log_metrics(step, metrics)
        if self.trackers is not None:
            self.trackers.announce()

    def message(self, text: str) -> None:
        """Something worth a line happened."""
        if self.console is not None:
            self.console.message(text)

    def warning(self, text: str) -> None:
        """Something happened that a person should know."""
        if self.console is not None:
            self.console.warning(text)

    def tracker_state(self) -> dict[str, Any]:
        """Identities of tracker runs, for the checkpoint."""
        return self.trackers.state() if self.trackers is not None else {}

    def close(self, exit_code: int) -> None:
        """The run is over."""
        if self.console is not None:
            self.console.close()
        if self.trackers is not None:
            self.trackers.finish(exit_code)
