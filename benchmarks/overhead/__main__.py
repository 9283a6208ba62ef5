"""``shardline bench overhead``: a step of Shardline beside the same step of a plain loop and of its peers.

``python -m benchmarks.overhead [--sizes tiny,quickstart] [--starts 5] [--pairs 60] [--warmup 22] [--control]
[--output FOLDER] [--nproc N] [--report FILE] [key=value ...]``

A plain PyTorch loop, Shardline, Accelerate, Lightning Fabric and the Trainer of transformers train the same model from
the same parameters on the same batches, all in one process group, taking turns step by step, in several starts of new
processes. Each row of the result is a median step time and its ratio to the plain loop's. See docs/benchmarks.md.
"""

import argparse
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import asdict

import torch

from benchmarks.measure.assignment import Assignment
from benchmarks.measure.driver import Benchmark, measure_on_ranks, num_ranks_of, run_as_program
from benchmarks.measure.overrides import refuse
from benchmarks.measure.same_work import check_same_work
from benchmarks.measure.sizes import QUICKSTART, SIZES
from benchmarks.overhead.table import markdown, plot, series
from benchmarks.presentation.result_files import append_row, raw_file
from sharding.ranks.errors import UserError, ends_with_a_sentence
from trainer.config import RunConfig, load_config
from trainer.config.rules import World, validate
from trainer.data.prepare import prepare_corpus
from trainer.runtime.threads import threads_per_rank

PACKAGES = ("torch", "transformers", "accelerate", "lightning-fabric", "numpy")
_BENCHMARK = Benchmark("overhead", PACKAGES, markdown, plot, series)

SIZE_NAMES = ("tiny", "quickstart")

_ACCUMULATION_STEPS = 2
_DECIDED = ("parallel.strategy", "parallel.backend")
_LOG_EVERY_STEPS = 10
# Two logged losses of every contestant lie within the warm-up; transformers writes one a step late.
MIN_WARMUP = 2 * _LOG_EVERY_STEPS + 2


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Measure, write raw times and a table, and print the table; returns the exit status."""
    return _BENCHMARK.run(_parse(arguments), _measure)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _BENCHMARK.parser()
    parser.add_argument("--sizes", default=",".join(SIZE_NAMES), help="separated by commas")
    parser.add_argument("--starts", type=int, default=5, help="how often each size is run, in new processes")
    parser.add_argument("--pairs", type=int, default=60, help="measured steps of each contestant in each start")
    parser.add_argument("--warmup", type=int, default=MIN_WARMUP, help="steps of each contestant that are discarded")
    parser.add_argument("--control", action="store_true", help="let a second copy of the plain loop take part")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the run that all train")
    return parser.parse_intermixed_args(arguments)


def _measure(options: argparse.Namespace) -> int:
    num_ranks = num_ranks_of(options)
    sizes = _sizes(options)
    configs = {size: contest_config(size, num_ranks, options.overrides) for size in sizes}
    if options.warmup < MIN_WARMUP or options.pairs < 1:
        raise UserError(
            f"--warmup {options.warmup} --pairs {options.pairs}: at least {MIN_WARMUP} steps of warm-up are needed, in "
            "which losses are compared, and 1 pair; raise them."
        )
    if options.starts < 1:
        raise UserError(f"--starts {options.starts}: at least 1 is needed, and 2 to say who is faster.")
    if importlib.util.find_spec("lightning_fabric") is None:
        raise UserError("lightning-fabric is not installed, and is one of the peers; pip install lightning-fabric.")
    for config in configs.values():
        prepare_corpus(config.data)
    raw = raw_file(options.output, "overhead", num_ranks, has_gpu=torch.cuda.is_available())
    assignments = [
        Assignment(
            size=size,
            config=config.model_dump(mode="json", by_alias=True),
            num_warmup=options.warmup,
            num_pairs=options.pairs,
            threads=threads_per_rank(config, num_ranks, os.environ),
            with_control=options.control,
            start=start,
            output=str(raw),
        )
        for start in range(options.starts)
        for size, config in configs.items()
    ]
    for first in assignments[: len(configs)]:
        setup = {"overrides": options.overrides, "threads": first.threads}
        planned = {"num_ranks": num_ranks, "num_starts": options.starts}
        append_row(raw, _BENCHMARK.header(setup, **planned) | asdict(first))
    status = 0
    for assignment in assignments:
        size, start = assignment.size, assignment.start
        status = measure_on_ranks("benchmarks.overhead.rank", assignment, num_ranks, raw, size=size, start=start)
        if status:
            break
    _BENCHMARK.report(raw)
    return status


def _sizes(options: argparse.Namespace) -> list[str]:
    sizes = options.sizes.split(",")
    unknown = [size for size in sizes if size not in SIZE_NAMES]
    if unknown:
        raise UserError(f"--sizes {options.sizes}: there is no size {unknown[0]}; there are {', '.join(SIZE_NAMES)}.")
    return sizes


def contest_config(size: str, num_ranks: int, overrides: Sequence[str]) -> RunConfig:
    """The run that all contestants train: the quickstart's, cut to a size, under DDP (one rank: no strategy).

    Args:
        size: one of ``SIZE_NAMES``.
        num_ranks: ranks; the global batch grows with them, two micro-batches a rank.
        overrides: ``key=value`` changes of the user's, last.

    Raises:
        UserError: the overrides do not fit.
    """
    refuse(overrides, _DECIDED, "shardline bench overhead races under ddp; see shardline bench scaling.")
    fixed = [
        f"name={size}",
        "steps=1000000",
        "schedule.total_steps=1000",
        f"parallel.strategy={'ddp' if num_ranks > 1 else 'none'}",
        f"metrics.every_steps={_LOG_EVERY_STEPS}",
        "evaluation.every_steps=0",
        "checkpoint.every_steps=0",
        "tracking.wandb.mode=disabled",
    ]
    config = load_config(QUICKSTART, [*SIZES[size].overrides, *fixed, *overrides])
    global_size = config.batch.micro_size * _ACCUMULATION_STEPS * num_ranks
    if not any(override.startswith("batch.global_size=") for override in overrides):
        config = config.model_copy(update={"batch": config.batch.model_copy(update={"global_size": global_size})})
    validate(config, World(num_ranks, has_gpu=torch.cuda.is_available()))
    check_same_work(config)
    return config


if __name__ == "__main__":
    run_as_program(main)
