"""What every benchmark does alike: its options, the head of its result, its ranks, and the report at the end."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure.comparison import Series, changes_since_last
from benchmarks.measure.facts import collect_facts
from benchmarks.measure.ranks import HEAP_VARIABLES, RankAssignment, run_ranks
from benchmarks.presentation.result_files import Rows, append_row, write_report


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as a command.

    Attributes:
        name: what ``shardline bench`` calls it.
        packages: whose versions its result says.
        markdown: makes its table of rows, the raw file's name, and lines that say what has changed.
        plot: makes its SVG of rows.
        series: what rows of a repeated result are compared by, by name.
        changes: makes lines that say what has changed since the last result, where ``series`` is not all there is to
            it.
    """

    name: str
    packages: Sequence[str]
    markdown: Callable[[Rows, str, Sequence[str]], str]
    plot: Callable[[Rows], str]
    series: Callable[[Rows], Mapping[str, Series]] = lambda _: {}
    changes: Callable[[Path], Sequence[str]] | None = None

    def parser(self, *, has_ranks: bool = True) -> argparse.ArgumentParser:
        """The options that benchmarks share; ``has_ranks`` adds the one for how many."""
        parser = argparse.ArgumentParser(prog=f"shardline bench {self.name}")
        if has_ranks:
            parser.add_argument("--nproc", type=int, default=0, help="ranks; 0 means one per GPU, or 2 without")
        parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the results")
        parser.add_argument("--report", type=Path, metavar="FILE", help="write table and plot of a raw file, no more")
        return parser

    def run(self, options: argparse.Namespace, measure: Callable[[argparse.Namespace], int]) -> int:
        """Measure, or report on what was measured before; returns the exit status."""
        if options.report is not None:
            self.report(options.report)
            return 0
        return measure(options)

    def header(self, setup: Mapping[str, Any], **values: Any) -> dict[str, Any]:
        """The first row of a result.

        Args:
            setup: what must be equal for two results to be compared.
            values: what else it says.
        """
        command = ["shardline", "bench", self.name, *sys.argv[1:]]
        return {"kind": "header", **collect_facts(self.packages), "command": command, **values, "setup": setup}

    def report(self, raw: Path) -> None:
        """Write table and plot beside a raw file, and print the table."""
        changes = self.changes(raw) if self.changes is not None else changes_since_last(raw, self.series)
        write_report(raw, self.markdown, self.plot, changes)


def num_ranks_of(options: argparse.Namespace) -> int:
    """Ranks that are started on this machine: as many as were asked for, one per GPU, or 2."""
    return options.nproc or torch.cuda.device_count() or 2


def measure_on_ranks(
    module: str,
    assignment: RankAssignment,
    num_ranks: int,
    raw: Path,
    /,
    *,
    variables: Mapping[str, str] = HEAP_VARIABLES,
    **labels: Any,
) -> int:
    """Run ranks to their end, and write a row that says how that was; returns their exit status.

    Args:
        module: see ``run_ranks``.
        assignment: what they are told.
        num_ranks: how many.
        raw: the raw file; its log lies beside it.
        variables: what to add to the environment.
        labels: what else the row says.
    """
    began_at = time.monotonic()
    status = run_ranks(module, assignment, num_ranks, raw.with_suffix(".log"), variables=variables)
    took = {"elapsed_s": time.monotonic() - began_at, "load_average": os.getloadavg()}
    append_row(raw, {"kind": "end", **labels, "exit_code": status, **took})
    return status


def run_as_program(main: Callable[[Sequence[str]], int]) -> None:
    """End the process with what ``main`` returns."""
    # A batch system's request to end is an interrupt: the table of what was measured is still written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
