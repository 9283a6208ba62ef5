"""``shardline bench checkpoint``: what saving costs a run, in the background and in place, and how fast it loads.

``python -m benchmarks.checkpoint [--saves 30] [--every 10] [--loads 5] [--output FOLDER] [--nproc N]
[--report FILE] [key=value ...]``

The quickstart's run is trained twice from its start, once with each way of saving, and then loaded. Every step's time
and what of it was waiting for a save is written as a row. See docs/benchmarks.md.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint.table import markdown, plot, series
from benchmarks.measure.driver import Benchmark, measure_on_ranks, num_ranks_of, run_as_program
from benchmarks.measure.overrides import refuse
from benchmarks.presentation.result_files import append_row, raw_file
from sharding.ranks.errors import UserError, ends_with_a_sentence
from trainer.config import load_config
from trainer.config.rules import World, validate
from trainer.data.prepare import prepare_corpus
from trainer.runtime.threads import threads_per_rank

MODES = ("asynchronous", "in_place", "load")
"""In this order: what is loaded was saved before."""

_PACKAGES = ("torch", "transformers", "safetensors", "numpy")
_BENCHMARK = Benchmark("checkpoint", _PACKAGES, markdown, plot, series)
_NUM_WARMUP_STEPS = 10
_DECIDED = (
    *("steps", "tokens", "epochs"),
    *("checkpoint.every_steps", "checkpoint.asynchronous", "metrics.every_steps"),
)
_QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


@dataclass(frozen=True)
class Assignment:
    """What a rank is told.

    Attributes:
        mode: one of ``MODES``.
        config: the run, as plain values.
        num_warmup: steps at the beginning that do not count.
        num_loads: how often it is loaded.
        threads: CPU threads of its operators.
        output: JSONL file that rank 0 appends to.
    """

    mode: str
    config: dict[str, Any]
    num_warmup: int
    num_loads: int
    threads: int
    output: str


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Measure, write raw times and a table, and print the table; returns the exit status."""
    parser = _BENCHMARK.parser()
    parser.add_argument("--saves", type=int, default=30, help="checkpoints that are saved in each way")
    parser.add_argument("--every", type=int, default=10, help="steps from one to the next")
    parser.add_argument("--loads", type=int, default=5, help="how often a checkpoint is loaded")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the run")
    return _BENCHMARK.run(parser.parse_intermixed_args(arguments), _measure)


def _measure(options: argparse.Namespace) -> int:
    num_ranks = num_ranks_of(options)
    if options.saves < 1 or options.every < 3 or options.loads < 1:
        raise UserError(
            f"--saves {options.saves} --every {options.every} --loads {options.loads}: at least 1 save, 3 steps from "
            "one to the next, of which one is beside a write and one is not, and 1 load are needed; raise them."
        )
    refuse(options.overrides, _DECIDED, "shardline bench checkpoint decides this itself; remove it.")
    raw = raw_file(options.output, "checkpoint", num_ranks, has_gpu=torch.cuda.is_available())
    # Where the results go, and not in memory, as temporary folders may be.
    with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=options.output) as folder:
        status = _measure_in(Path(folder), options, num_ranks, raw)
    _BENCHMARK.report(raw)
    return status


def _measure_in(folder: Path, options: argparse.Namespace, num_ranks: int, raw: Path) -> int:
    num_steps = _NUM_WARMUP_STEPS + options.saves * options.every + 1
    for mode in MODES:
        fixed = [
            f"name={'in_place' if mode == 'in_place' else 'asynchronous'}",
            f"output_dir={folder}",
            # What is loaded trains on for a while, so that its peak of memory is known.
            f"steps={num_steps + (_NUM_WARMUP_STEPS if mode == 'load' else 0)}",
            f"checkpoint.every_steps={options.every}",
            f"checkpoint.asynchronous={'false' if mode == 'in_place' else 'true'}",
            # A line just before each save: it tells of the one before, and no other step is longer for it.
            f"metrics.every_steps={options.every}",
            "evaluation.every_steps=0",
            "tracking.wandb.mode=disabled",
        ]
        config = load_config(_QUICKSTART, ["schedule.total_steps=1000", *fixed, *options.overrides])
        validate(config, World(num_ranks, has_gpu=torch.cuda.is_available()))
        prepare_corpus(config.data)
        assignment = Assignment(
            mode=mode,
            config=config.model_dump(mode="json", by_alias=True),
            num_warmup=_NUM_WARMUP_STEPS,
            num_loads=options.loads,
            threads=threads_per_rank(config, num_ranks, os.environ),
            output=str(raw),
        )
        if mode == MODES[0]:
            threads = assignment.threads
            setup = {"every": options.every, "overrides": options.overrides, "threads": threads}
            header = _BENCHMARK.header(setup, num_ranks=num_ranks, threads=threads, config=assignment.config)
            append_row(raw, header)
        # A run's own heap.
        module = "benchmarks.checkpoint.rank"
        status = measure_on_ranks(module, assignment, num_ranks, raw, variables={}, mode=mode)
        if status:
            return status
    return 0


if __name__ == "__main__":
    run_as_program(main)
