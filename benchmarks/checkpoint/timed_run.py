"""A run as it is, and what its loop and its phases tell of time: each step, and what of it was waiting for a save."""

import json
import time
from collections.abc import Callable
from typing import Any

from benchmarks.measure.turns import StepEdge
from sharding.ranks.process_group import Ranks
from trainer.build import build_trainer
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import RunConfig
from trainer.data.prepare_stages import prepare_run
from trainer.loop import Trainer
from trainer.run_folder.folder import RunFolder
from trainer.runtime.phases import Phase, Phases, PhaseState
from trainer.trackers.console import Console
from trainer.trackers.observers import Observers

WriteStep = Callable[..., None]
"""Takes the row of a step."""


class TimedRun:
    """One Trainer; a step is timed from one agreement of ranks to the next."""

    def __init__(self, config: RunConfig, ranks: Ranks, write: WriteStep | None = None) -> None:
        """Build the Trainer in its run folder.

        Args:
            config: the run.
            ranks: this rank's place.
            write: takes a row for each step; None where nobody asks.
        """
        self.folder = RunFolder(config.run_dir)
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self._config = config
        self._write = write
        self._phases = Phases()
        self._phases.listen(self._see_phase)
        self._step_edge: StepEdge | None = None
        self._edge_at: float | None = None
        self._blocking_s = 0.0
        # Whether a write goes on when a step begins, whether it was made valid in it, and whether one was begun in it.
        self._is_writing = self._was_writing = self._commits = self._saves = False
        console = Console(config.num_steps, (self.folder.path / "console.txt").open("a"))
        observers = Observers(self.folder.metrics_file, console if ranks.rank == 0 else None, attempt=1)
        self.trainer: Trainer = build_trainer(
            config,
            ranks,
            prepare_run(config),
            self.folder,
            observers,
            self._phases,
            is_stop_requested=self._is_stop_requested,
            before_commit=lambda: None,
        )

    def run(self, step_edge: StepEdge) -> None:
        """Train from the start; ``step_edge`` is called at the end of each step, and may take its time."""
        self._step_edge = step_edge
        self.trainer.resume_or_init()
        self.trainer.fit()

    def settle(self) -> None:
        """Wait for what a step has left under way between ranks."""
        self.trainer.parts.engine.settle()

    def written_s(self) -> list[float]:
        """Seconds that each write took, as the run has logged it."""
        lines = [json.loads(line) for line in self.folder.metrics_file.read_text().splitlines()]
        return [line["checkpoint/write_s"] for line in lines if "checkpoint/write_s" in line]

    def num_bytes(self) -> int:
        """Size of the newest checkpoint; 0 where there is none."""
        newest = self.folder.newest_checkpoint()
        return sum(entry.num_bytes for entry in CheckpointReader(newest[1]).manifest.files.values()) if newest else 0

    def _is_stop_requested(self) -> bool:
        now = time.perf_counter()
        if self._edge_at is not None:
            if self._write is not None:
                row: dict[str, Any] = {"step": self._phases.now.step - 1, "wall_s": now - self._edge_at}
                beside_write = self._was_writing and not self._commits
                self._write(row | {"blocking_s": self._blocking_s, "saves": self._saves, "beside_write": beside_write})
            if self._step_edge is not None:
                self._step_edge()
        self._edge_at, self._blocking_s = time.perf_counter(), 0.0
        self._saves = self._commits = False
        self._was_writing = self._is_writing
        return False

    def _see_phase(self, ended: PhaseState, begun: PhaseState) -> None:
        if ended.phase is Phase.SAVE:
            self._blocking_s += begun.since - ended.since
        if begun.phase is not Phase.SAVE:
            return
        if ended.phase is Phase.AGREE:
            self._commits, self._is_writing = True, False
        else:
            self._saves, self._is_writing = True, self._config.checkpoint.asynchronous
