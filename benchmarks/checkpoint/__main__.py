"""``shardline bench checkpoint``: what saving costs a run, in the background and in place, and how fast it loads.

``python -m benchmarks.checkpoint [--starts 5] [--saves 12] [--every 5] [--loads 5] [--output FOLDER] [--nproc N]
[--report FILE] [key=value ...]``

Three runs of the quickstart's model take turns in one process group, one for each way of saving and one that does not
save. Every step's time and what of it was waiting for a save is written as a row. Then a run is trained and loaded by
itself. See docs/benchmarks.md.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint.table import markdown, plot, series
from benchmarks.measure.driver import Benchmark, measure_on_ranks, num_ranks_of, run_as_program
from benchmarks.measure.overrides import refuse
from benchmarks.presentation.result_files import append_row, raw_file
from sharding.ranks.errors import UserError, ends_with_a_sentence
from trainer.config import RunConfig, load_config
from trainer.config.rules import World, validate
from trainer.data.prepare import prepare_corpus
from trainer.runtime.threads import threads_per_rank

MODES = ("none", "asynchronous", "in_place")
"""Ways of saving that take turns."""

PROTOCOL = 2
"""What rows mean: runs take turns; results of another protocol are not compared."""

_PACKAGES = ("torch", "transformers", "safetensors", "numpy")
_BENCHMARK = Benchmark("checkpoint", _PACKAGES, markdown, plot, series)
_NUM_WARMUP_STEPS = 10
_NUM_STEPS_AFTER_LOAD = 10
_DECIDED = (
    *("steps", "tokens", "epochs"),
    *("checkpoint.every_steps", "checkpoint.asynchronous", "metrics.every_steps"),
)
_QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


@dataclass(frozen=True)
class Assignment:
    """What a rank is told.

    Attributes:
        part: ``turns``, ``alone`` or ``load``, in this order: what is loaded was saved before.
        start: which start of the turns this is, from 0.
        configs: by mode, a run as plain values; of the latter parts one, which is ``alone``.
        num_warmup: steps of each run that do not count; the step after them saves.
        num_turns: turns of each that count.
        turn_steps: steps of a turn, from one save to the next.
        num_loads: how often it is loaded.
        threads: CPU threads of its operators.
        output: JSONL file that rank 0 appends to.
    """

    part: str
    start: int
    configs: dict[str, dict[str, Any]]
    num_warmup: int
    num_turns: int
    turn_steps: int
    num_loads: int
    threads: int
    output: str


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Measure, write raw times and a table, and print the table; returns the exit status."""
    parser = _BENCHMARK.parser()
    parser.add_argument("--starts", type=int, default=5, help="how often the turns are begun, in new processes")
    parser.add_argument("--saves", type=int, default=12, help="checkpoints that are saved in each way in each start")
    parser.add_argument("--every", type=int, default=5, help="steps from one to the next")
    parser.add_argument("--loads", type=int, default=5, help="how often a checkpoint is loaded")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the run")
    return _BENCHMARK.run(parser.parse_intermixed_args(arguments), _measure)


def _measure(options: argparse.Namespace) -> int:
    num_ranks = num_ranks_of(options)
    if min(options.starts, options.saves, options.loads) < 1 or options.every < 3:
        raise UserError(
            f"--starts {options.starts} --saves {options.saves} --every {options.every} --loads {options.loads}: at "
            "least 1 start, 1 save, 3 steps from one to the next, of which one is beside a write and one is not, and 1 "
            "load are needed; raise them."
        )
    refuse(options.overrides, _DECIDED, "shardline bench checkpoint decides this itself; remove it.")
    raw = raw_file(options.output, "checkpoint", num_ranks, has_gpu=torch.cuda.is_available())
    # Where the results go, and not in memory, as temporary folders may be.
    with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=options.output) as folder:
        status = _measure_in(Path(folder), options, num_ranks, raw)
    _BENCHMARK.report(raw)
    return status


def _measure_in(folder: Path, options: argparse.Namespace, num_ranks: int, raw: Path) -> int:
    num_warmup = warmup_steps(options.every)
    # One more: the turns end while a step is due.
    num_steps = num_warmup + options.saves * options.every + 1
    first = _config(folder, options, MODES[0], num_steps, num_ranks)
    prepare_corpus(first.data)
    threads = threads_per_rank(first, num_ranks, os.environ)
    setup = {"protocol": PROTOCOL, "every": options.every, "overrides": options.overrides, "threads": threads}
    values = first.model_dump(mode="json", by_alias=True)
    planned = {"num_starts": options.starts, "num_turns": options.saves, "turn_steps": options.every}
    append_row(raw, _BENCHMARK.header(setup, num_ranks=num_ranks, threads=threads, config=values, **planned))

    def launch(part: str, start: int, configs: Mapping[str, RunConfig]) -> int:
        assignment = Assignment(
            part=part,
            start=start,
            configs={mode: config.model_dump(mode="json", by_alias=True) for mode, config in configs.items()},
            num_warmup=num_warmup,
            num_turns=options.saves,
            turn_steps=options.every,
            num_loads=options.loads,
            threads=threads,
            output=str(raw),
        )
        what = f"turns, start {start + 1} of {options.starts}" if part == "turns" else part
        began_at = time.monotonic()
        # A run's own heap.
        module = "benchmarks.checkpoint.rank"
        status = measure_on_ranks(module, assignment, num_ranks, raw, variables={}, part=part, start=start)
        print(f"{what}: {time.monotonic() - began_at:.0f} s", flush=True)
        return status

    for start in range(options.starts):
        runs = folder / f"start-{start}"
        configs = {mode: _config(runs, options, mode, num_steps, num_ranks) for mode in MODES}
        if status := launch("turns", start, configs):
            return status
    for part, steps in (("alone", num_warmup + 1), ("load", num_warmup + 1 + _NUM_STEPS_AFTER_LOAD)):
        # What is loaded trains on for a while, so that its peak of memory is known.
        if status := launch(part, 0, {"alone": _config(folder, options, "alone", steps, num_ranks)}):
            return status
    return 0


def warmup_steps(every: int) -> int:
    """Steps before the first turn, so many that each turn begins with a step that saves."""
    return next(steps for steps in range(_NUM_WARMUP_STEPS, _NUM_WARMUP_STEPS + every) if (steps + 1) % every == 0)


def _config(folder: Path, options: argparse.Namespace, mode: str, num_steps: int, num_ranks: int) -> RunConfig:
    fixed = [
        f"name={mode}",
        f"output_dir={folder}",
        f"steps={num_steps}",
        f"checkpoint.every_steps={0 if mode == 'none' else options.every}",
        f"checkpoint.asynchronous={'false' if mode == 'in_place' else 'true'}",
        # A line just before each save: it tells of the one before, and no other step is longer for it.
        f"metrics.every_steps={options.every}",
        "evaluation.every_steps=0",
        "tracking.wandb.mode=disabled",
    ]
    config = load_config(_QUICKSTART, ["schedule.total_steps=1000", *fixed, *options.overrides])
    validate(config, World(num_ranks, has_gpu=torch.cuda.is_available()))
    return config


if __name__ == "__main__":
    run_as_program(main)
