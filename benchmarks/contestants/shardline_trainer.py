"""Shardline: the Trainer that a run has, built as a run builds it, in its own loop."""

import json
from typing import Any

from torch.profiler import record_function

from benchmarks.contestants.contest import Contest, Contestant, StepLog
from benchmarks.measure.step_profile import INPUT_SPAN
from benchmarks.measure.turns import StepEdge
from sharding.config import Backend
from trainer.build import build_trainer
from trainer.data.prepared_stages import whole_run
from trainer.run_folder.folder import RunFolder
from trainer.runtime.phases import Phase, Phases, PhaseState
from trainer.runtime.stopping import StopRequest
from trainer.trackers.console import Console
from trainer.trackers.observers import Observers


class ShardlineTrainer(Contestant):
    """``Trainer.fit`` as it is: the loader reads ahead, ranks agree on targets and stopping, metrics go to a file.

    A step's edge is where the loop turns to its next batch, as in the others; all from there to the same place in
    the next step is measured.
    """

    name = "shardline"

    def __init__(self, contest: Contest, backend: Backend = "torch") -> None:
        """Build the Trainer in a run folder of its own.

        Args:
            contest: what all share.
            backend: what carries out the strategy.
        """
        parallel = contest.config.parallel.model_copy(update={"backend": backend})
        config = contest.config.model_copy(update={"parallel": parallel})
        self._run_folder = RunFolder(contest.folder / f"run-{backend}")
        self._run_folder.path.mkdir(parents=True)
        self._stop_request = StopRequest()
        self._step_edge: StepEdge | None = None
        self._has_begun = False
        self._is_first_rank = contest.ranks.rank == 0
        self._console_text = (self._run_folder.path / "console.txt").open("w")
        console = Console(config.num_steps, self._console_text) if self._is_first_rank else None
        phases = Phases()
        phases.listen(self._hear)
        self._input_span = record_function(INPUT_SPAN)
        self._trainer = build_trainer(
            config,
            contest.ranks,
            whole_run(config, contest.corpus),
            self._run_folder,
            Observers(self._run_folder.metrics_file, console),
            phases,
            is_stop_requested=self._is_stop_requested,
            before_commit=lambda: None,
        )
        self.settings: dict[str, Any] = {"parallel": parallel.model_dump(mode="json")}

    def run(self, step_edge: StepEdge) -> None:
        """See Contestant."""
        self._step_edge = step_edge
        try:
            self._trainer.resume_or_init()
            self._trainer.fit()
        finally:
            self._trainer.close()
            self._console_text.close()

    def settle(self) -> None:
        """See Contestant; the bucketed engine gathers parameters after its step."""
        self._trainer.parts.engine.settle()

    def step_log(self) -> StepLog:
        """See Contestant; read from metrics.jsonl."""
        lines = [json.loads(line) for line in self._run_folder.metrics_file.read_text().splitlines()]
        losses = {line["step"]: line["train/loss"] for line in lines}
        return StepLog(losses, {line["step"]: line["train/grad_norm"] for line in lines})

    def _hear(self, ended: PhaseState, begun: PhaseState) -> None:
        """See edges, and show a profiler where the loop waits for a batch, as torch's DataLoader does by itself."""
        if ended.phase is Phase.DATA:
            self._input_span.__exit__(None, None, None)
        if begun.phase is Phase.DATA:
            # The first is not the end of a step.
            if self._has_begun:
                assert self._step_edge is not None
                self._step_edge()
            self._has_begun = True
            self._input_span = record_function(INPUT_SPAN)
            self._input_span.__enter__()

    def _is_stop_requested(self) -> bool:
        return self._stop_request.poll(self._run_folder.stop_file if self._is_first_rank else None)
