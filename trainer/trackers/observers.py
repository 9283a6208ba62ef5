"""Those who watch a run on rank 0: the console, the trackers and the user's own. On other ranks nobody watches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.faults.hang.heartbeat import read_heartbeats
from trainer.files.storage import CheckpointPath
from trainer.metrics.file import Metrics, finite_or_none
from trainer.metrics.goodput_ledger import GoodputLedger
from trainer.metrics.stragglers import StragglerWatch
from trainer.run_folder.events import record_event
from trainer.trackers.composite import Trackers
from trainer.trackers.console import Console
from trainer.trackers.observer import OwnObservers


@dataclass(frozen=True)
class Observers:
    """Passes news on to whoever is there.

    Attributes:
        metrics_path: where metrics.jsonl is written.
        console: progress for a person; None on all ranks but the first.
        trackers: wandb and others; None on all ranks but the first.
        attempt: number of the run's attempt.
        stragglers: tells of slow ranks; None on all ranks but the first.
        ledger: what the run's time is spent on; None on all ranks but the first.
        own: observers of the user's own; None on all ranks but the first.
    """

    metrics_path: Path
    console: Console | None = None
    trackers: Trackers | None = None
    attempt: int = 0
    stragglers: StragglerWatch | None = None
    ledger: GoodputLedger | None = None
    own: OwnObservers | None = None

    @property
    def is_watched(self) -> bool:
        """Whether anybody watches; so it is on rank 0."""
        return self.console is not None

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
        rank, ratio = metrics["throughput/slowest_rank"], metrics["throughput/slowest_rank_ratio"]
        if self.stragglers is not None and self.stragglers.see(int(rank or 0), float(ratio or 1.0)):
            self.name_straggler(step, int(rank or 0), float(ratio or 1.0))
        if self.own is not None:
            metrics = finite_or_none(metrics)
            self.own.tell("on_step", step, metrics)
            if evaluated := {name: value for name, value in metrics.items() if name.startswith("eval/")}:
                self.own.tell("on_evaluate", step, evaluated)

    def saved(self, step: int, folder: CheckpointPath) -> None:
        """The checkpoint after a step is complete."""
        self.info(f"saved {folder}")
        if self.own is not None:
            self.own.tell("on_save", step, folder)

    def name_straggler(self, step: int, rank: int, ratio: float) -> None:
        """A rank is slow, but alive."""
        run_dir = self.metrics_path.parent
        heartbeat = read_heartbeats(run_dir / "logs" / f"attempt-{self.attempt}").get(rank)
        host = heartbeat.host if heartbeat is not None else "an unknown machine"
        record_event(run_dir, "straggler", attempt=self.attempt, step=step, rank=rank, host=host, ratio=ratio)
        self.warn(f"rank {rank} on {host} is slow: without it steps would take 1/{ratio:.2f} of their time")

    def info(self, text: str) -> None:
        """Something worth a line happened."""
        if self.console is not None:
            self.console.info(text)

    def warn(self, text: str) -> None:
        """Something happened that should not be overlooked."""
        if self.console is not None:
            self.console.warning(text)

    def event(self, kind: str, step: int, **details: Any) -> None:
        """Something out of the ordinary happened: it goes to events.jsonl."""
        if self.is_watched:
            record_event(self.metrics_path.parent, kind, attempt=self.attempt, step=step, **details)

    def goodput(self) -> Metrics:
        """Share of training in the run's time so far, over all attempts, where that is known."""
        return {"goodput/fraction": self.ledger.fraction()} if self.ledger is not None else {}

    def rolled_back(self) -> None:
        """The run has rolled back; lines of later steps were taken out of metrics.jsonl."""
        if self.trackers is not None:
            self.trackers.announce()

    def tracker_state(self) -> dict[str, Any]:
        """Identities of tracker runs, for the checkpoint."""
        return self.trackers.state() if self.trackers is not None else {}

    def close(self, exit_code: int) -> None:
        """The run is over."""
        if self.console is not None:
            self.console.close()
        if self.trackers is not None:
            self.trackers.finish(exit_code)
