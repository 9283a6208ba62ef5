"""One rank of ``shardline bench checkpoint``: runs that take turns, a run alone, or one that is loaded."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.checkpoint.__main__ import Assignment
from benchmarks.checkpoint.timed_run import TimedRun
from benchmarks.measure.measured_run import peak_resident_bytes
from benchmarks.measure.protocol import order_of_round
from benchmarks.measure.rank_end import process_ends
from benchmarks.measure.turns import StepEdge, Turns
from benchmarks.presentation.result_files import append_row
from sharding.ranks.process_group import Ranks, process_group
from sharding.ranks.process_lifetime import die_with_parent
from trainer.config import RunConfig, parse_config
from trainer.runtime.host_memory import keep_freed_memory


def main(arguments: Sequence[str]) -> None:
    """Measure one part; the only argument is a JSON file with an Assignment."""
    die_with_parent()
    assignment = Assignment(**json.loads(Path(arguments[0]).read_text()))
    configs = {mode: parse_config(values, source="checkpoint") for mode, values in assignment.configs.items()}
    torch.set_num_threads(assignment.threads)
    if not torch.cuda.is_available():
        # As a run does.
        keep_freed_memory(os.environ)
    with process_ends(), process_group(next(iter(configs.values())).launch.init_timeout_s) as ranks:
        measurement = _Measurement(assignment, configs, ranks)
        {"turns": measurement.take_turns, "alone": measurement.train, "load": measurement.load}[assignment.part]()


class _Measurement:
    """What one launch measures."""

    def __init__(self, assignment: Assignment, configs: dict[str, RunConfig], ranks: Ranks) -> None:
        self._assignment = assignment
        self._configs = configs
        self._ranks = ranks
        self._turn = -1

    def take_turns(self) -> None:
        """One run for each way of saving, and one that does not; after the warm-up each turn has one save in it."""
        assignment = self._assignment
        runs = {mode: self._timed(mode, config) for mode, config in self._configs.items()}
        turns = {mode: self._start(run) for mode, run in runs.items()}
        for index in range(assignment.num_turns + 1):
            self._turn = index - 1
            num_steps = assignment.turn_steps if index else assignment.num_warmup
            for mode in order_of_round(list(turns), index, seed=f"checkpoint:{assignment.start}"):
                self._wait_for_all_ranks()
                turns[mode].take(num_steps)
        for mode, run in runs.items():
            turns[mode].end()
            run.trainer.close()
            if written_s := run.written_s():
                self._write(kind="writes", mode=mode, seconds=written_s, num_bytes=run.num_bytes())

    def train(self) -> None:
        """A run by itself, for its memory, and so that there is something to load."""
        run = TimedRun(self._configs["alone"], self._ranks)
        run.run(lambda: None)
        self._write(kind="memory", mode="alone", when="trained", peak_bytes=self._largest(peak_resident_bytes()))
        run.trainer.close()

    def load(self) -> None:
        """Load the newest checkpoint of a run several times, and train on."""
        run = TimedRun(self._configs["alone"], self._ranks)
        newest = run.folder.newest_checkpoint()
        assert newest is not None
        peak = {"built": self._largest(peak_resident_bytes())}
        for _ in range(self._assignment.num_loads):
            if self._ranks.rank == 0 and isinstance(newest[1], Path):
                _forget(newest[1])
            self._wait_for_all_ranks()
            started_at = time.perf_counter()
            run.trainer.resume_or_init()
            self._wait_for_all_ranks()
            seconds = time.perf_counter() - started_at
            self._write(kind="load", mode="load", seconds=seconds, num_bytes=run.num_bytes())
        peak["loaded"] = self._largest(peak_resident_bytes())
        run.trainer.fit()
        peak["trained on"] = self._largest(peak_resident_bytes())
        for when, num_bytes in peak.items():
            self._write(kind="memory", mode="load", when=when, peak_bytes=num_bytes)
        run.trainer.close()

    def _timed(self, mode: str, config: RunConfig) -> TimedRun:
        def write(row: dict[str, Any]) -> None:
            self._write(kind="warmup" if self._turn < 0 else "step", mode=mode, turn=self._turn, **row)

        return TimedRun(config, self._ranks, write)

    def _start(self, run: TimedRun) -> Turns:
        def train(step_edge: StepEdge) -> None:
            # Threads of operators are a thread's own.
            torch.set_num_threads(self._assignment.threads)
            if self._ranks.device.type == "cuda":
                torch.cuda.set_device(self._ranks.device)
            run.run(step_edge)

        return Turns(train, run.settle)

    def _wait_for_all_ranks(self) -> None:
        # On the host, over gloo.
        dist.all_reduce(torch.zeros(1))

    def _largest(self, value: int) -> int:
        largest = torch.tensor([value])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def _write(self, **row: Any) -> None:
        if self._ranks.rank == 0:
            append_row(Path(self._assignment.output), {"start": self._assignment.start, **row})


def _forget(folder: Path) -> None:
    """Have the system drop what it keeps of files in memory, so that they are read from the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    main(sys.argv[1:])
