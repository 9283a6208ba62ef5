"""One rank of ``shardline bench throughput``: a run as it is, measured."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants.race import row_writer
from benchmarks.measure.measured_run import MeasuredRun, Windows
from benchmarks.measure.rank_end import process_ends
from sharding.ranks.process_group import process_group
from sharding.ranks.process_lifetime import die_with_parent
from trainer.config import parse_config
from trainer.runtime.host_memory import keep_freed_memory


@dataclass(frozen=True)
class ThroughputAssignment:
    """What a rank is told.

    Attributes:
        row: name of the rung.
        config: the run, as plain values.
        has_synthetic_tokens: whether the loader's place is taken by one batch.
        keeps_freed_memory: whether the heap keeps what is freed.
        num_warmup: steps that do not count.
        num_windows: windows that do.
        window_steps: steps of each.
        threads: CPU threads of its operators.
        output: JSONL file that rank 0 appends to.
    """

    row: str
    config: dict[str, Any]
    has_synthetic_tokens: bool
    keeps_freed_memory: bool
    num_warmup: int
    num_windows: int
    window_steps: int
    threads: int
    output: str


def main(arguments: Sequence[str]) -> None:
    """Measure one rung; the only argument is a JSON file with a ThroughputAssignment."""
    die_with_parent()
    assignment = ThroughputAssignment(**json.loads(Path(arguments[0]).read_text()))
    config = parse_config(assignment.config, source=assignment.row)
    torch.set_num_threads(assignment.threads)
    if assignment.keeps_freed_memory:
        keep_freed_memory(os.environ)
    windows = Windows(assignment.num_warmup, assignment.num_windows, assignment.window_steps)
    timeout_s = config.launch.init_timeout_s
    with process_ends(), process_group(timeout_s) as ranks, tempfile.TemporaryDirectory() as folder:
        write = row_writer(assignment.output, {"row": assignment.row}, ranks)
        run = MeasuredRun(config, ranks, windows, write, has_synthetic_tokens=assignment.has_synthetic_tokens)
        run.run(Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
