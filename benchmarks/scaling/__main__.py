"""``shardline bench scaling``: weak and strong scaling over ranks, each strategy beside its peers.

``python -m benchmarks.scaling [--size short] [--config FILE] [--ranks 1,2,4] [--modes weak,strong]
[--strategies ddp,zero1,zero2,zero3] [--field contest|settings] [--contestants NAMES] [--starts 5] [--add-to FILE]
[--pairs 60] [--warmup 12] [--steps-per-turn 1] [--profile-steps 3] [--output FOLDER] [--report FILE] [key=value ...]``

On each number of ranks all contestants of a strategy train the same model on the same batches in one process group,
taking turns. That is done in several starts, each in new processes. See docs/benchmarks.md. Under Slurm
``slurm/scaling.sbatch`` starts the ranks.
"""

import argparse
import csv
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants.field import builders_of, settings_of
from benchmarks.contestants.race import Rounds
from benchmarks.measure.driver import Benchmark, run_as_program
from benchmarks.measure.facts import collect_facts
from benchmarks.measure.ranks import HEAP_VARIABLES
from benchmarks.measure.sizes import SIZES, Size, size_named
from benchmarks.presentation.result_files import append_row, raw_file
from benchmarks.scaling.changes import changes_of
from benchmarks.scaling.launches import first_start, launch_all, write_assignments
from benchmarks.scaling.plan import (
    FIELDS,
    LOG_EVERY_STEPS,
    MODES,
    STRATEGIES,
    ScalingAssignment,
    plan_races,
    rank_counts,
)
from benchmarks.scaling.table import markdown, plot
from sharding.ranks.errors import UserError, ends_with_a_sentence
from trainer.config import parse_config
from trainer.data.prepare import prepare_corpus
from trainer.runtime.threads import threads_per_rank

PACKAGES = ("torch", "transformers", "accelerate", "lightning-fabric", "deepspeed", "numpy")
PROTOCOL = 2
"""What times and names of contestants mean; results of another one are not compared."""

# One logged loss of every contestant lies within the warm-up; transformers writes it a step late.
MIN_WARMUP_STEPS = LOG_EVERY_STEPS + 2


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Measure, write raw times, a table and a plot, and print the table; returns the exit status."""
    return _BENCHMARK.run(_parse(arguments), _measure)


def _measure(options: argparse.Namespace) -> int:
    if options.allocation:
        # Standard output is the batch script's to read.
        with redirect_stdout(sys.stderr):
            raw, assignments = _plan(options)
            folder, names = write_assignments(assignments, raw)
        launches = {"raw": raw, "assignments": folder, "launches": " ".join(names)}
        for name, value in {**launches, **HEAP_VARIABLES}.items():
            print(f"export {name}={shlex.quote(str(value))}")
        return 0
    raw, assignments = _plan(options)
    status = launch_all(assignments, raw)
    _BENCHMARK.report(raw)
    return status


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _BENCHMARK.parser(has_ranks=False)
    parser.add_argument("--size", default="short", help=f"one of {', '.join(SIZES)}")
    parser.add_argument("--config", type=Path, help="a run of your own in place of a size")
    parser.add_argument("--ranks", default="", help="such as 1,2,4; default: doubling up to one per GPU, or 4 on a CPU")
    parser.add_argument("--modes", default=",".join(MODES), help="separated by commas")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="separated by commas")
    parser.add_argument("--field", default=FIELDS[0], choices=FIELDS, help="everyone, or peers in all their settings")
    parser.add_argument("--contestants", default="", help="who takes part, separated by commas; default: all there are")
    parser.add_argument("--starts", type=int, default=5, help="how often each race is run, in new processes")
    parser.add_argument("--add-to", type=Path, metavar="FILE", help="a result that the starts are added to")
    parser.add_argument("--pairs", type=int, default=60, help="measured turns of each contestant in each race")
    parser.add_argument("--warmup", type=int, default=MIN_WARMUP_STEPS, help="turns that are discarded")
    parser.add_argument("--steps-per-turn", type=int, default=1, help="steps between two synchronisations")
    parser.add_argument("--profile-steps", type=int, default=3, help="steps of each that are profiled; 0 for none")
    no_memory = "whether to measure what each contestant of several ranks holds"
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help=no_memory)
    parser.add_argument("--allocation", default="", metavar="NODESxRANKS", help="write down what Slurm is to start")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the run that all train")
    return parser.parse_intermixed_args(arguments)


def _plan(options: argparse.Namespace) -> tuple[Path, list[ScalingAssignment]]:
    """Check everything and write the raw file's header; returns the file, and what each number of ranks is to do."""
    has_gpu = torch.cuda.is_available()
    counts, ranks_per_node = _counts(options)
    modes, strategies = _known("modes", options.modes, MODES), _known("strategies", options.strategies, STRATEGIES)
    size = Size(options.config) if options.config else size_named(options.size, has_gpu=has_gpu)
    rounds = Rounds(options.warmup, options.pairs, options.steps_per_turn, options.profile_steps)
    _check_rounds(rounds)
    if options.starts < 1:
        raise UserError(f"--starts {options.starts}: at least 1 is needed, and 2 to say who is faster.")
    if options.field == "settings":
        # Nobody has settings to find out where nothing is sharded.
        strategies = [strategy for strategy in strategies if strategy != "ddp"]
        counts = [count for count in counts if count > 1]
    contestants = _contestants(options, strategies)
    races = plan_races(size, options.overrides, counts=counts, modes=modes, strategies=strategies, has_gpu=has_gpu)
    first = parse_config(races[0].config, source="scaling")
    # The same on any number of ranks: a rank that had more cores alone would make the others look bad.
    threads = threads_per_rank(first, ranks_per_node, os.environ)
    size_name = str(options.config) if options.config else options.size
    setup = {
        "protocol": PROTOCOL,
        "size": size_name,
        "micro_size": first.batch.micro_size,
        "sequence_length": first.data.sequence_length,
        "overrides": options.overrides,
        "threads": threads,
        "steps_per_turn": options.steps_per_turn,
        "field": options.field,
    }
    raw = options.add_to
    start = first_start(raw, setup) if raw else 0
    prepare_corpus(first.data)
    if raw is None:
        kind = "scaling" if options.field == "contest" else f"scaling-{options.field}"
        raw = raw_file(options.output, kind, max(counts), has_gpu=has_gpu)
        header = _BENCHMARK.header(
            setup, size=size_name, counts=counts, ranks_per_node=ranks_per_node, threads=threads, config=races[0].config
        )
        append_row(raw, header | asdict(rounds))
    starts = list(range(start, start + options.starts))
    labels = [race.label for race in races]
    append_row(raw, {"kind": "plan", "races": labels, "starts": starts, **asdict(rounds), **collect_facts(PACKAGES)})
    assignments = [
        ScalingAssignment(
            race=asdict(race),
            start=number,
            # What a step is made of is no matter of luck: one start says it.
            rounds=asdict(rounds if number == starts[0] else replace(rounds, num_profiled=0)),
            field=options.field,
            contestants=contestants,
            threads=threads,
            output=str(raw.absolute()),
        )
        for number in starts
        for race in races
    ]
    # What is held is the same in every start.
    measured = [one for one in assignments if one.start == starts[0] and one.plan.num_ranks > 1]
    if options.memory and options.field == FIELDS[0]:
        assignments += [replace(one, measures_memory=True) for one in measured]
    return raw, assignments


def _counts(options: argparse.Namespace) -> tuple[list[int], int]:
    """Numbers of ranks, and how many of them a node has at most."""
    nodes, _, per_node = options.allocation.partition("x")
    if options.allocation and not (nodes.isdigit() and per_node.isdigit() and int(nodes) and int(per_node)):
        raise UserError(f"--allocation {options.allocation}: write nodes x ranks of each, such as 2x4.")
    if options.allocation:
        counts = rank_counts(int(nodes), int(per_node))
    else:
        counts = rank_counts(1, torch.cuda.device_count() or 4)
    if options.ranks:
        texts = options.ranks.split(",")
        if not all(text.isdigit() and int(text) for text in texts):
            raise UserError(f"--ranks {options.ranks}: write numbers separated by commas, such as 1,2,4.")
        chosen = sorted({int(text) for text in texts})
        if options.allocation and not set(chosen) <= set(counts):
            raise UserError(f"--ranks {options.ranks}: of {options.allocation} ranks only {counts} can be measured.")
        counts = chosen
    return counts, int(per_node) if options.allocation else max(counts)


def _known(option: str, text: str, choices: Sequence[Any]) -> list[Any]:
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in choices]
    if unknown:
        raise UserError(f"--{option} {text}: there is no {unknown[0]}; there are {', '.join(choices)}.")
    return [name for name in choices if name in chosen]


def _contestants(options: argparse.Namespace, strategies: Sequence[Any]) -> list[str]:
    builders = settings_of if options.field == "settings" else builders_of
    there_are = {name for strategy in strategies for name in builders(strategy)}
    # A name that has a comma itself stands in quotation marks.
    chosen: list[str] = next(csv.reader([options.contestants])) if options.contestants else sorted(there_are)
    unknown = [name for name in chosen if name not in there_are]
    if unknown or "plain" not in chosen:
        wrong = f"there is no {unknown[0]}" if unknown else "plain, which others are compared with, is missing"
        raise UserError(f"--contestants {options.contestants}: {wrong}; there are {', '.join(sorted(there_are))}.")
    for name, package in (("fabric", "lightning_fabric"), ("deepspeed", "deepspeed")):
        if any(one.startswith(name) for one in chosen) and importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed, and is one of the peers; install it, or set --contestants.")
    return chosen


def _check_rounds(rounds: Rounds) -> None:
    num_steps = rounds.num_warmup * rounds.steps_per_turn
    if rounds.num_pairs < 1 or rounds.steps_per_turn < 1 or num_steps < MIN_WARMUP_STEPS or rounds.num_profiled < 0:
        raise UserError(
            f"--warmup {rounds.num_warmup} x --steps-per-turn {rounds.steps_per_turn} = {num_steps} steps, --pairs "
            f"{rounds.num_pairs}: at least {MIN_WARMUP_STEPS} steps of warm-up are needed, in which losses are "
            "compared, and 1 pair; raise them."
        )


_BENCHMARK = Benchmark("scaling", PACKAGES, markdown, plot, changes=changes_of)

if __name__ == "__main__":
    run_as_program(main)
