"""One rank of ``shardline bench checkpoint``: a run as it is, and what its loop and its phases tell of time."""

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.checkpoint.__main__ import Assignment
from benchmarks.measure.measured_run import peak_resident_bytes
from benchmarks.presentation.result_files import append_row
from sharding.ranks.errors import EXIT_FAILED, EXIT_FINISHED
from sharding.ranks.process_group import Ranks, process_group
from sharding.ranks.process_lifetime import die_with_parent
from trainer.build import build_trainer
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import RunConfig, parse_config
from trainer.data.prepare_stages import prepare_run
from trainer.loop import Trainer
from trainer.run_folder.folder import RunFolder
from trainer.runtime.host_memory import keep_freed_memory
from trainer.runtime.phases import Phase, Phases, PhaseState
from trainer.runtime.processes import end_process
from trainer.trackers.console import Console
from trainer.trackers.observers import Observers


def main(arguments: Sequence[str]) -> None:
    """Measure one way; the only argument is a JSON file with an Assignment."""
    die_with_parent()
    assignment = Assignment(**json.loads(Path(arguments[0]).read_text()))
    config = parse_config(assignment.config, source="checkpoint")
    torch.set_num_threads(assignment.threads)
    try:
        with process_group(config.launch.init_timeout_s) as ranks:
            _Measurement(assignment, config, ranks).run()
    except BaseException:  # noqa: BLE001 - whatever it was, the other ranks must not wait for this one
        traceback.print_exc()
        end_process(EXIT_FAILED)
    end_process(EXIT_FINISHED)


class _Measurement:
    """Trains or loads one run; a step is timed from one agreement of ranks to the next."""

    def __init__(self, assignment: Assignment, config: RunConfig, ranks: Ranks) -> None:
        self._assignment = assignment
        self._config = config
        self._ranks = ranks
        self._folder = RunFolder(config.run_dir)
        self._folder.path.mkdir(parents=True, exist_ok=True)
        self._phases = Phases()
        self._phases.listen(self._see_phase)
        self._edge_at: float | None = None
        self._blocking_s = 0.0
        # Whether a write goes on when a step begins, whether it was made valid in it, and whether one was begun in it.
        self._is_writing = self._was_writing = self._commits = self._saves = False

    def run(self) -> None:
        """All of it."""
        if not torch.cuda.is_available():
            # As a run does.
            keep_freed_memory(os.environ)
        if self._assignment.mode == "load":
            self._measure_loads()
        else:
            trainer = self._build()
            trainer.resume_or_init()
            trainer.fit()
            self._write(kind="memory", when="trained", peak_bytes=self._largest(peak_resident_bytes()))
            trainer.close()
            lines = [json.loads(line) for line in self._folder.metrics_file.read_text().splitlines()]
            written_s = [line["checkpoint/write_s"] for line in lines if "checkpoint/write_s" in line]
            self._write(kind="writes", seconds=written_s, num_bytes=self._num_bytes())

    def _build(self) -> Trainer:
        console = Console(self._config.num_steps, (self._folder.path / "console.txt").open("a"))
        observers = Observers(self._folder.metrics_file, console if self._ranks.rank == 0 else None, attempt=1)
        return build_trainer(
            self._config,
            self._ranks,
            prepare_run(self._config),
            self._folder,
            observers,
            self._phases,
            is_stop_requested=self._is_stop_requested,
            before_commit=lambda: None,
        )

    def _measure_loads(self) -> None:
        trainer = self._build()
        newest = self._folder.newest_checkpoint()
        assert newest is not None
        self._write(kind="memory", when="built", peak_bytes=self._largest(peak_resident_bytes()))
        for _ in range(self._assignment.num_loads):
            if self._ranks.rank == 0 and isinstance(newest[1], Path):
                _forget(newest[1])
            self._wait_for_all_ranks()
            started_at = time.perf_counter()
            trainer.resume_or_init()
            self._wait_for_all_ranks()
            self._write(kind="load", seconds=time.perf_counter() - started_at, num_bytes=self._num_bytes())
        self._write(kind="memory", when="loaded", peak_bytes=self._largest(peak_resident_bytes()))
        trainer.fit()
        self._write(kind="memory", when="trained on", peak_bytes=self._largest(peak_resident_bytes()))
        trainer.close()

    def _is_stop_requested(self) -> bool:
        now = time.perf_counter()
        if self._edge_at is not None and self._assignment.mode != "load":
            step = self._phases.now.step - 1
            self._write(
                kind="warmup" if step <= self._assignment.num_warmup else "step",
                step=step,
                wall_s=now - self._edge_at,
                blocking_s=self._blocking_s,
                saves=self._saves,
                beside_write=self._was_writing and not self._commits,
            )
        self._edge_at, self._blocking_s = now, 0.0
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

    def _num_bytes(self) -> int:
        """Size of the newest checkpoint."""
        newest = self._folder.newest_checkpoint()
        return sum(entry.num_bytes for entry in CheckpointReader(newest[1]).manifest.files.values()) if newest else 0

    def _wait_for_all_ranks(self) -> None:
        # On the host, over gloo.
        dist.all_reduce(torch.zeros(1))

    def _largest(self, value: int) -> int:
        largest = torch.tensor([value])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def _write(self, **row: Any) -> None:
        if self._ranks.rank == 0:
            append_row(Path(self._assignment.output), {"mode": self._assignment.mode} | row)


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
