"""``shardline bench throughput``: a ladder of techniques, from eager attention in fp32 to all that run here.

``python -m benchmarks.throughput [--size quickstart] [--config FILE] [--rungs NAMES] [--windows 6] [--window-steps 10]
[--warmup 5] [--passes 2] [--nproc N] [--output FOLDER] [--report FILE] [key=value ...]``

Each rung is a run of its own, with one technique more than the one below. See docs/benchmarks.md.
"""

import argparse
import os
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measure.driver import Benchmark, num_ranks_of, run_as_program
from benchmarks.measure.ladder import BEGINNING, LADDER, Machine, Rung, rung_config
from benchmarks.measure.overrides import refuse
from benchmarks.measure.ranks import INTERRUPTED, run_ranks
from benchmarks.measure.sizes import SIZES, Size, size_named
from benchmarks.presentation.result_files import append_row, raw_file
from benchmarks.throughput.rank import ThroughputAssignment
from benchmarks.throughput.table import markdown, plot, series
from sharding.config import PrecisionConfig
from sharding.float8 import LEAST_CAPABILITY
from sharding.precision import compute_dtype
from sharding.ranks.errors import UserError, ends_with_a_sentence
from trainer.config import RunConfig
from trainer.data.prepare import prepare_corpus
from trainer.runtime.threads import threads_per_rank

PACKAGES = ("torch", "transformers", "numpy")
_BENCHMARK = Benchmark("throughput", PACKAGES, markdown, plot, series)
_LONGEST_REASON = 200


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Measure, write raw times, a table and a plot, and print the table; returns the exit status."""
    return _BENCHMARK.run(_parse(arguments), lambda options: _Ladder(options).climb())


class _Ladder:
    """All rungs in all passes, and which of them stay."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Check everything.

        Raises:
            UserError: the options do not fit.
        """
        has_gpu = torch.cuda.is_available()
        device = torch.device("cuda" if has_gpu else "cpu")
        num_ranks = num_ranks_of(options)
        has_bf16 = compute_dtype(PrecisionConfig(), device) is torch.bfloat16
        self._options = options
        # The tokenizer is known when the corpus is there.
        capability = torch.cuda.get_device_capability() if has_gpu else (0, 0)
        fp8_recipes = [recipe for recipe, least in LEAST_CAPABILITY.items() if capability >= least]
        self._machine = Machine(num_ranks, has_gpu, has_bf16, fp8_recipes, tokenizer_size=0)
        name = options.size or ("llama-1b" if has_gpu else "quickstart")
        self._size_name = str(options.config) if options.config else name
        own = options.config and Size(options.config, has_own_batch=True)
        self._size = own or size_named(name, has_gpu=has_gpu)
        self._rungs = _chosen(options.rungs)
        decided = {text.partition("=")[0] for text in (*BEGINNING, *(o for rung in LADDER for o in rung.overrides))}
        refuse(options.overrides, decided, "a rung of the ladder decides this; --rungs chooses among them.")
        if min(options.windows, options.window_steps, options.warmup, options.passes) < 1:
            raise UserError(
                f"--windows {options.windows} --window-steps {options.window_steps} --warmup {options.warmup} --passes "
                f"{options.passes}: each must be at least 1."
            )
        # One more: the loop is left where it asks before a step.
        self._num_steps = options.warmup + options.windows * options.window_steps + 1
        lowest = self._config(LADDER[0], [])
        self._machine = replace(self._machine, tokenizer_size=prepare_corpus(lowest.data).vocab_size)
        self._threads = threads_per_rank(lowest, num_ranks, os.environ)
        size_slug = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(self._size_name).stem if options.config else self._size_name)
        self._raw = raw_file(options.output, f"throughput_{size_slug}", num_ranks, has_gpu=has_gpu)
        header = _BENCHMARK.header(
            {"size": self._size_name, "overrides": options.overrides, "threads": self._threads},
            size=self._size_name,
            num_ranks=num_ranks,
            threads=self._threads,
            num_windows=options.windows,
            window_steps=options.window_steps,
            num_warmup=options.warmup,
            num_passes=options.passes,
            config=lowest.model_dump(mode="json", by_alias=True),
        )
        append_row(self._raw, header)

    def climb(self) -> int:
        """Measure all; returns the exit status, 0 also where a rung has failed but not all."""
        status = 1
        try:
            configs = self._first_pass()
            status = 0 if configs else 1
            for number in range(1, self._options.passes):
                # Up and down in turn: what drifts with time then falls on all alike.
                for rung, config in reversed(configs) if number % 2 else configs:
                    self._measure(rung, config, number)
        except KeyboardInterrupt:
            status = INTERRUPTED
        _BENCHMARK.report(self._raw)
        return status

    def _first_pass(self) -> list[tuple[Rung, RunConfig]]:
        """Measure from bottom to top; returns the rungs that ran, with their runs."""
        kept: list[str] = []
        keeps_freed_memory = False
        configs = []
        for technique in self._rungs:
            # What no setting turns on is not in the configuration.
            rung = replace(technique, keeps_freed_memory=keeps_freed_memory or technique.keeps_freed_memory)
            try:
                config = self._config(rung, kept)
            except UserError as error:
                self._leave_out(rung, "skipped", str(error))
                continue
            if self._measure(rung, config, 0):
                self._leave_out(rung, "failed", _last_line(self._raw.with_suffix(".log")))
                continue
            configs.append((rung, config))
            if rung.is_kept:
                kept += rung.overrides
                keeps_freed_memory = rung.keeps_freed_memory
        return configs

    def _measure(self, rung: Rung, config: RunConfig, number: int) -> int:
        options = self._options
        assignment = ThroughputAssignment(
            row=rung.name,
            config=config.model_dump(mode="json", by_alias=True),
            has_synthetic_tokens=rung.has_synthetic_tokens,
            keeps_freed_memory=rung.keeps_freed_memory,
            num_warmup=options.warmup,
            num_windows=options.windows,
            window_steps=options.window_steps,
            threads=self._threads,
            output=str(self._raw),
        )
        row = {"kind": "rung", "row": rung.name, "pass": number, "is_kept": rung.is_kept}
        append_row(self._raw, row | {"config": assignment.config})
        print(f"{rung.name}, pass {number + 1} of {options.passes}", flush=True)
        started_at = time.monotonic()
        # No settings of the heap from outside: they are a rung.
        log = self._raw.with_suffix(".log")
        status = run_ranks("benchmarks.throughput.rank", assignment, self._machine.num_ranks, log, variables={})
        elapsed_s = time.monotonic() - started_at
        end = {"exit_code": status, "elapsed_s": elapsed_s, "load_average": os.getloadavg()}
        append_row(self._raw, {"kind": "end", "row": rung.name, "pass": number, **end})
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        return status

    def _config(self, rung: Rung, kept: Sequence[str]) -> RunConfig:
        return rung_config(rung, self._size, kept, self._options.overrides, self._machine, self._num_steps)

    def _leave_out(self, rung: Rung, kind: str, reason: str) -> None:
        print(f"{rung.name}: {kind}, {reason}", flush=True)
        append_row(self._raw, {"kind": kind, "row": rung.name, "reason": reason})


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _BENCHMARK.parser()
    parser.add_argument("--size", help=f"one of {', '.join(SIZES)}; default: llama-1b on a GPU, else quickstart")
    parser.add_argument("--config", type=Path, help="a run of your own in place of a size")
    parser.add_argument(
        "--rungs", default="", help="parts of names, separated by commas, of those to measure; default: all"
    )
    parser.add_argument("--windows", type=int, default=6, help="measured windows of each rung in each pass")
    parser.add_argument("--window-steps", type=int, default=10, help="steps between two synchronisations")
    parser.add_argument("--warmup", type=int, default=5, help="steps that are discarded")
    parser.add_argument("--passes", type=int, default=2, help="how often the ladder is climbed, up and down in turn")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the run, on every rung")
    return parser.parse_intermixed_args(arguments)


def _chosen(text: str) -> list[Rung]:
    parts = text.split(",") if text else [""]
    unknown = [part for part in parts if not any(part in rung.name for rung in LADDER)]
    if unknown:
        there_are = ", ".join(rung.name for rung in LADDER)
        raise UserError(f"--rungs {text}: no rung has {unknown[0]} in its name; there are: {there_are}.")
    return [rung for rung in LADDER if any(part in rung.name for part in parts)]


def _last_line(log: Path) -> str:
    """What a failed rank said last, as a rule the error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:_LONGEST_REASON] if lines else "and said nothing"


if __name__ == "__main__":
    run_as_program(main)
