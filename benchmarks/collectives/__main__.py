"""``shardline bench collectives``: bandwidth of collectives by size of the message, and of each link between ranks.

``python -m benchmarks.collectives [--min-bytes 4096] [--max-bytes 134217728] [--factor 8] [--rounds 20] [--warmup 3]
[--nproc N] [--output FOLDER] [--report FILE]``

Under srun, torchrun or mpirun each task is a rank, so that an allocation of many nodes is measured; otherwise ranks are
started on this machine. See docs/benchmarks.md.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.collectives.rank import CollectivesAssignment, measure_here
from benchmarks.collectives.table import markdown, plot, series
from benchmarks.measure.driver import Benchmark, measure_on_ranks, num_ranks_of, run_as_program
from benchmarks.presentation.result_files import append_row, raw_file
from sharding.ranks.errors import UserError, ends_with_a_sentence
from sharding.ranks.rank_place import place_variables, read_ranks

_PACKAGES = ("torch", "numpy")
_BENCHMARK = Benchmark("collectives", _PACKAGES, markdown, plot, series)
# One fp32 element.
_SMALLEST_BYTES = 4


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Measure, write raw times, a table and a plot, and print the table; returns the exit status."""
    options = _parse(arguments)
    return _BENCHMARK.run(options, _measure)


def _measure(options: argparse.Namespace) -> int:
    is_rank = "RANK" in os.environ or bool(place_variables(os.environ))
    rank, num_ranks, _, ranks_here = read_ranks(os.environ)
    if not is_rank:
        num_ranks = ranks_here = num_ranks_of(options)
    sizes = message_sizes(options.min_bytes, options.max_bytes, options.factor)
    if options.rounds < 1 or options.warmup < 1:
        raise UserError(f"--rounds {options.rounds} --warmup {options.warmup}: each must be at least 1.")
    if num_ranks < 2:
        raise UserError(f"--nproc {num_ranks}: one rank talks to nobody; measure at least 2.")
    # The others write nothing, and their nodes may not have it.
    makes_folder = rank == 0
    raw = raw_file(
        options.output, "collectives", num_ranks, has_gpu=torch.cuda.is_available(), makes_folder=makes_folder
    )
    assignment = CollectivesAssignment(
        sizes=sizes,
        num_warmup=options.warmup,
        num_rounds=options.rounds,
        threads=max(1, len(os.sched_getaffinity(0)) // ranks_here),
        output=str(raw.absolute()),
    )
    if rank == 0:
        append_row(raw, _header(options, assignment, num_ranks, ranks_here))
    if not is_rank:
        status = measure_on_ranks("benchmarks.collectives.rank", assignment, num_ranks, raw)
    else:
        status = measure_here(assignment)
        if rank == 0:
            append_row(raw, {"kind": "end", "exit_code": status, "load_average": os.getloadavg()})
    if rank == 0:
        _BENCHMARK.report(raw)
    return status


def message_sizes(smallest: int, largest: int, factor: int) -> list[int]:
    """Sizes in bytes, each ``factor`` times the one before.

    Raises:
        UserError: there is none, or no end to them.
    """
    if smallest < _SMALLEST_BYTES or largest < smallest or factor < 2:
        raise UserError(
            f"--min-bytes {smallest} --max-bytes {largest} --factor {factor}: sizes go from at least {_SMALLEST_BYTES} "
            "bytes up, each at least twice the one before."
        )
    sizes = [smallest]
    while sizes[-1] * factor <= largest:
        sizes.append(sizes[-1] * factor)
    return sizes


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _BENCHMARK.parser()
    parser.add_argument("--min-bytes", type=int, default=4 << 10, help="size of the smallest message")
    parser.add_argument("--max-bytes", type=int, default=128 << 20, help="size of the largest message at most")
    parser.add_argument("--factor", type=int, default=8, help="from one size to the next")
    parser.add_argument("--rounds", type=int, default=20, help="measured rounds, each over all collectives and sizes")
    parser.add_argument("--warmup", type=int, default=3, help="rounds that are discarded")
    return parser.parse_args(arguments)


def _header(
    options: argparse.Namespace, assignment: CollectivesAssignment, num_ranks: int, ranks_here: int
) -> dict[str, Any]:
    return _BENCHMARK.header(
        {"sizes": assignment.sizes, "threads": assignment.threads},
        num_ranks=num_ranks,
        ranks_per_node=ranks_here,
        threads=assignment.threads,
        num_warmup=options.warmup,
        num_rounds=options.rounds,
        backend="nccl" if torch.cuda.is_available() else "gloo",
    )


if __name__ == "__main__":
    run_as_program(main)
