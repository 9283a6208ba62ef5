"""``shardline tune CONFIG``: the fastest way to take a run's steps on this machine, and what each takes of memory.

``python -m benchmarks.tune CONFIG [--nproc N] [--strategies ddp,zero2] [--memory-gib G] [--steps 8] [--warmup 3]
[--no-compile] [--no-recompute] [--output FOLDER] [--json] [key=value ...]``

The training stays the same: model, data, optimizer and global batch are the run's own. See docs/benchmarks.md.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console

from benchmarks.measure.facts import collect_facts
from benchmarks.measure.overrides import refuse
from benchmarks.measure.ranks import INTERRUPTED, run_ranks
from benchmarks.presentation.result_files import append_row, raw_file, read_rows
from benchmarks.throughput.rank import ThroughputAssignment
from benchmarks.throughput.table import read_rungs
from benchmarks.tune.plan import (
    Candidate,
    Trial,
    gives_up,
    layouts,
    micro_sizes,
    pareto,
    refinements,
    table_rows,
    trial_values,
    verdict,
)
from benchmarks.tune.rank import LIMIT_VARIABLE
from benchmarks.tune.table import markdown, show
from sharding.config import Strategy
from sharding.parallel_dims import parallel_dims
from sharding.ranks.errors import UserError, ends_with_a_sentence
from trainer.architectures.config import build_model_config
from trainer.config import RunConfig, load_config
from trainer.config.rules import World, validate
from trainer.config.short_runs import UNJUDGED, beginning_of_schedule
from trainer.data.packed import sample_facts
from trainer.data.prepare import prepare_corpus
from trainer.model.memory_estimate import estimate_memory
from trainer.model.models import build_model_on_meta
from trainer.runtime.json_output import output_aside, print_json
from trainer.runtime.threads import threads_per_rank
from trainer.tasks.registry import configured_task

_STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3")
_PACKAGES = ("torch", "transformers", "numpy")
_GIB = 2**30
# Of a GPU's memory: the driver and NCCL have the rest.
_USABLE = 0.95
_OUT_OF_MEMORY = (
    # What the kernel does then.
    "killed by SIGKILL",
    "OutOfMemoryError",
    "not enough memory",
    "MemoryError",
    "Cannot allocate memory",
    "bad_alloc",
    "can't start new thread",
)
_REFINEMENTS = "compiled blocks and recomputed activations"


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Search, write raw times and a table, and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="shardline tune")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("--nproc", type=int, default=0, help="ranks; 0 means one per GPU, or 2 where there is none")
    parser.add_argument("--strategies", default=",".join(_STRATEGIES), help="to try, separated by commas")
    parser.add_argument("--memory-gib", type=float, default=0.0, help="memory of a rank; 0 means what the machine has")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each candidate")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them that do not count")
    parser.add_argument("--no-compile", action="store_true", help="do not try compiled blocks")
    parser.add_argument("--no-recompute", action="store_true", help="do not try activation checkpointing")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the results")
    parser.add_argument("--json", action="store_true", help="for programs: one JSON document")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the run")
    options = parser.parse_intermixed_args(arguments)
    with output_aside(options.json):
        search = _Search(options)
        status = search.run()
    if options.json:
        print_json(search.values())
    return status


class _Search:
    """All trials, in the order in which they were made."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Check everything.

        Raises:
            UserError: the options or the run do not fit.
        """
        self._options = options
        self._has_gpu = torch.cuda.is_available()
        self._num_ranks = options.nproc or torch.cuda.device_count() or 2
        self._strategies = _strategies(options.strategies)
        if options.steps < 1 or options.warmup < 0:
            raise UserError(f"--steps {options.steps} --warmup {options.warmup}: at least 1 and 0 are needed.")
        chosen = [override.partition("=")[0] for override in Candidate(1, "ddp").overrides]
        refuse(options.overrides, chosen, "shardline tune tries these itself; remove it, or see --strategies.")
        self._given = given = load_config(options.config, options.overrides)
        if given.parallel.backend not in ("torch", "bucketed"):
            raise UserError(
                f"parallel.backend={given.parallel.backend}: tune chooses among the strategies of backends torch and "
                "bucketed; set one of them."
            )
        if given.batch.global_size % self._num_ranks:
            raise UserError(
                f"batch.global_size={given.batch.global_size} is not divisible by {self._num_ranks} ranks; set "
                "another, or --nproc."
            )
        self._global_size = given.batch.global_size
        self._corpus = prepare_corpus(given.data)
        self._threads = threads_per_rank(given, self._num_ranks, os.environ)
        self._memory_bytes = options.memory_gib * _GIB or self._device_memory()
        self._trials: list[Trial] = []
        # What is still to be tried, for people.
        self._left: list[str] = []
        self._raw = raw_file(options.output, "tune", self._num_ranks, has_gpu=self._has_gpu)
        append_row(
            self._raw,
            {
                "kind": "header",
                **collect_facts(_PACKAGES),
                "command": ["shardline", "tune", *sys.argv[1:]],
                "num_ranks": self._num_ranks,
                "threads": self._threads,
                "memory_bytes": self._memory_bytes,
                "config": given.model_dump(mode="json", by_alias=True),
            },
        )

    def run(self) -> int:
        """Try everything; returns the exit status, 1 where nothing could be measured."""
        if self._options.memory_gib:
            os.environ[LIMIT_VARIABLE] = str(int(self._memory_bytes))
        planned = layouts(self._num_ranks, self._strategies)
        refines = not (self._options.no_compile and self._options.no_recompute)
        self._left = [layout.layout for layout in planned] + ([_REFINEMENTS] if refines else [])
        try:
            for layout in planned:
                self._try_sizes(layout)
                self._left.remove(layout.layout)
            candidates = self._refinements()
            self._left = [candidate.label for candidate in candidates]
            for candidate in candidates:
                self._try(candidate)
                self._left.remove(candidate.label)
            status = 0 if pareto(self._trials) else 1
        except KeyboardInterrupt:
            status = INTERRUPTED
        self._report()
        return status

    def values(self) -> dict[str, Any]:
        """What came of it for programs."""
        front = pareto(self._trials)
        return {
            "use": list(front[0].candidate.overrides) if front else None,
            "trials": [trial_values(trial, front) for trial in self._trials],
            "left": self._left,
            "raw": str(self._raw),
        }

    def _refinements(self) -> list[Candidate]:
        options = self._options
        return refinements(self._trials, with_compile=not options.no_compile, with_recompute=not options.no_recompute)

    def _try_sizes(self, layout: Candidate) -> None:
        """One layout at growing micro-batches, until they do not fit or are no faster."""
        rates: list[float] = []
        for size in micro_sizes(self._global_size, self._num_ranks):
            trial = self._try(Candidate(size, layout.strategy, layout.backend))
            if trial.tokens_per_s is None:
                return
            rates.append(trial.tokens_per_s)
            if gives_up(rates):
                print(f"{layout.layout}: larger micro-batches are no faster", flush=True)
                return

    def _try(self, candidate: Candidate) -> Trial:
        trial = self._measure(candidate)
        self._trials.append(trial)
        found = trial.reason or f"{trial.tokens_per_s:,.0f} tokens/s, {(trial.peak_bytes or 0) / _GIB:.2f} GiB"
        print(f"{candidate.label}: {found}", flush=True)
        return trial

    def _measure(self, candidate: Candidate) -> Trial:
        try:
            config = self._config(candidate)
            estimated = self._estimate(config)
        except UserError as error:
            return Trial(candidate, 0.0, reason=f"not possible: {error}")
        if estimated > self._memory_bytes:
            more = f"needs at least {estimated / _GIB:.2f} GiB, a rank has {self._memory_bytes / _GIB:.2f}"
            return Trial(candidate, estimated, reason=more)
        options = self._options
        assignment = ThroughputAssignment(
            row=candidate.label,
            config=config.model_dump(mode="json", by_alias=True),
            has_synthetic_tokens=False,
            keeps_freed_memory=not self._has_gpu,
            num_warmup=options.warmup,
            num_windows=options.steps,
            window_steps=1,
            threads=self._threads,
            output=str(self._raw),
        )
        row = {"kind": "rung", "row": candidate.label, "pass": 0, "is_kept": False}
        append_row(self._raw, row | {"config": assignment.config})
        log = self._raw.with_suffix(".log")
        began_at = log.stat().st_size if log.exists() else 0
        status = run_ranks("benchmarks.tune.rank", assignment, self._num_ranks, log, variables={}, shows_log=False)
        append_row(self._raw, {"kind": "end", "row": candidate.label, "pass": 0, "exit_code": status})
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        if status:
            said = log.read_bytes()[began_at:].decode(errors="replace")
            return Trial(candidate, estimated, reason=_why(said, status))
        result = next(rung for rung in read_rungs(read_rows(self._raw)) if rung.name == candidate.label)
        return Trial(candidate, estimated, tuple(result.rates), result.peak_bytes)

    def _config(self, candidate: Candidate) -> RunConfig:
        num_steps = self._options.warmup + self._options.steps + 1
        fixed = [
            "name=tune",
            f"steps={num_steps}",
            "tokens=null",
            "epochs=null",
            *beginning_of_schedule(self._given, num_steps, total_steps=100_000),
            f"metrics.every_steps={num_steps}",
            *UNJUDGED,
            "checkpoint.every_steps=0",
            "checkpoint.keep_every=0",
            "tracking.wandb.mode=disabled",
        ]
        config = load_config(self._options.config, [*self._options.overrides, *fixed, *candidate.overrides])
        validate(config, World(self._num_ranks, has_gpu=self._has_gpu))
        return config

    def _estimate(self, config: RunConfig) -> float:
        facts = sample_facts(self._corpus, config.data)
        model_config = build_model_config(config.model, facts)
        task = configured_task(config.task, facts, loss_chunk_tokens=0)
        model = build_model_on_meta(task, config.model, facts)
        device = torch.device("cuda" if self._has_gpu else "cpu")
        dims = parallel_dims(config.parallel, self._num_ranks)
        return estimate_memory(config, model, model_config, dims, device).total

    def _device_memory(self) -> float:
        if self._has_gpu:
            return _USABLE * torch.cuda.get_device_properties(0).total_memory
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        return available / self._num_ranks

    def _report(self) -> None:
        rows, use = table_rows(self._trials), verdict(self._trials, self._left)
        self._raw.with_suffix(".md").write_text(markdown(rows, use) + "\n")
        show(rows, use, Console(highlight=False))
        print(f"written to {self._raw} and .md; what libraries said is in .log")


def _strategies(text: str) -> list[Strategy]:
    names = text.split(",")
    known = [name for name in get_args(Strategy) if name in _STRATEGIES]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--strategies {text}: {unknown[0]} cannot be tried; there are {', '.join(known)}.")
    return [name for name in known if name in names]


def _why(said: str, status: int) -> str:
    """Why ranks failed, from what they said."""
    if any(sign in said for sign in _OUT_OF_MEMORY):
        return "out of memory"
    last = [line.strip() for line in said.splitlines() if line.strip()]
    return f"failed: {last[-1][:200]}" if last else f"failed with status {status}"


if __name__ == "__main__":
    # A batch system's request to end is an interrupt: what was measured is still shown.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
