"""Shardline: the Trainer that a run has, built as a run builds it, in its own loop."""

import json
from typing import Any

from benchmarks.contestants.contest import Contest, StepLog
from benchmarks.turns import StepEdge
from trainer.build import build_trainer
from trainer.console import Console
from trainer.observers import Observers
from trainer.phases import Phases
from trainer.run_folder import RunFolder
from trainer.stopping import StopRequest


class ShardlineTrainer:
    """``Trainer.fit`` as it is: the loader reads ahead, ranks agree on targets and stopping, metrics go to a file.

    A step's edge is where the loop asks whether to stop, once per step; everything from there to the same place in the
    next step is measured.
    """

    name = "shardline"

    def __init__(self, contest: Contest) -> None:
        """Build the Trainer in a run folder of its own."""
        self._run_folder = RunFolder(contest.folder / "run")
        self._run_folder.path.mkdir(parents=True)
        self._stop_request = StopRequest()
        self._step_edge: StepEdge | None = None
        self._num_asked = 0
        self._is_first_rank = contest.ranks.rank == 0
        self._console_text = (contest.folder / "console.txt").open("w")
        console = Console(contest.config.num_steps, self._console_text) if self._is_first_rank else None
        self._trainer = build_trainer(
            contest.config,
            contest.ranks,
            contest.corpus,
            self._run_folder,
            Observers(self._run_folder.metrics_file, console),
            Phases(),
            is_stop_requested=self._is_stop_requested,
            before_commit=lambda: None,
        )
        self.settings: dict[str, Any] = {"parallel": contest.config.parallel.model_dump(mode="json")}

    def run(self, step_edge: StepEdge) -> None:
        """See Contestant."""
        self._step_edge = step_edge
        try:
            self._trainer.resume_or_init()
            self._trainer.fit()
        finally:
            self._trainer.close()
            self._console_text.close()

    def step_log(self) -> StepLog:
        """See Contestant; read from metrics.jsonl."""
        lines = [json.loads(line) for line in self._run_folder.metrics_file.read_text().splitlines()]
        return StepLog({line["step"]: line["train/loss"] for line in lines})

    def _is_stop_requested(self) -> bool:
        assert self._step_edge is not None
        # The loop asks before each step, so the first question is not the end of one.
        if self._num_asked:
            self._step_edge()
        self._num_asked += 1
        return self._stop_request.poll(self._run_folder.stop_file if self._is_first_rank else None)
