"""``shardline bench memory``: bytes that each rank holds, measured beside the formula of its strategy.

``python -m benchmarks.memory [--config FILE] [--cases ddp,zero1,...] [--nproc N] [--output FOLDER] [--report FILE]
[key=value ...]``

Each case, an engine with a strategy, is built on all ranks and takes some steps while every allocation is recorded. See
docs/benchmarks.md.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measure.comparison import changes_since_last
from benchmarks.measure.facts import collect_facts
from benchmarks.measure.ranks import run_ranks
from benchmarks.memory.rank import MemoryAssignment
from benchmarks.memory.table import markdown, plot, series
from benchmarks.presentation.result_files import append_row, raw_file, write_report
from sharding.ranks.errors import UserError, ends_with_a_sentence
from trainer.config import RunConfig, load_config
from trainer.config.rules import World, validate
from trainer.data.tokenizer import TRAINED, load_tokenizer, vocabulary_size
from trainer.runtime.threads import threads_per_rank

CASES: dict[str, list[str]] = {
    "ddp": ["parallel.strategy=ddp"],
    "zero1": ["parallel.strategy=zero1"],
    "zero2": ["parallel.strategy=zero2"],
    "zero3": ["parallel.strategy=zero3"],
    "bucketed-zero1": ["parallel.strategy=zero1", "parallel.engine=bucketed"],
    "bucketed-zero2": ["parallel.strategy=zero2", "parallel.engine=bucketed"],
    "bucketed-zero3": ["parallel.strategy=zero3", "parallel.engine=bucketed"],
    "deepspeed-zero1": ["parallel.strategy=zero1", "parallel.backend=deepspeed"],
    "deepspeed-zero2": ["parallel.strategy=zero2", "parallel.backend=deepspeed"],
    "deepspeed-zero3": ["parallel.strategy=zero3", "parallel.backend=deepspeed"],
}
"""Settings of each case."""

# Large enough that buffers of fixed size are a small part, and small enough for four ranks on two cores.
_MODEL = (
    "model.config.hidden_size=512",
    "model.config.intermediate_size=1408",
    "model.config.num_hidden_layers=8",
    "model.config.num_attention_heads=8",
    "model.config.num_key_value_heads=4",
    "data.vocab_size=4096",
    "batch.micro_size=2",
)
_ACCUMULATION_STEPS = 2
_PACKAGES = ("torch", "transformers", "deepspeed", "numpy")
_QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Measure, write raw numbers, a table and a plot, and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="shardline bench memory")
    parser.add_argument("--config", type=Path, help="a run of your own in place of the benchmark's")
    parser.add_argument("--cases", default=",".join(CASES), help="separated by commas")
    parser.add_argument("--nproc", type=int, default=0, help="ranks; 0 means one per GPU, or 2 where there is none")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the results")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write table and plot of a raw file, and no more")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the run")
    options = parser.parse_intermixed_args(arguments)
    if options.report is not None:
        report(options.report)
        return 0
    return _measure(options)


def _measure(options: argparse.Namespace) -> int:
    has_gpu = torch.cuda.is_available()
    num_ranks = options.nproc or torch.cuda.device_count() or 2
    chosen = options.cases.split(",")
    unknown = [case for case in chosen if case not in CASES]
    if unknown:
        raise UserError(f"--cases {options.cases}: there is no case {unknown[0]}; there are {', '.join(CASES)}.")
    configs = {case: case_config(case, options.config, num_ranks, options.overrides) for case in chosen}
    threads = threads_per_rank(configs[chosen[0]], num_ranks, os.environ)
    values = {case: config.model_dump(mode="json", by_alias=True) for case, config in configs.items()}
    raw = raw_file(options.output, "memory", num_ranks, has_gpu=has_gpu)
    header = {
        "kind": "header",
        **collect_facts(_PACKAGES),
        "command": ["shardline", "bench", "memory", *sys.argv[1:]],
        "num_ranks": num_ranks,
        "threads": threads,
        "setup": {"config": str(options.config or "memory"), "overrides": options.overrides},
        "config": values[chosen[0]],
    }
    append_row(raw, header)
    status = run_ranks(
        "benchmarks.memory.rank", MemoryAssignment(values, threads, str(raw)), num_ranks, raw.with_suffix(".log")
    )
    append_row(raw, {"kind": "end", "exit_code": status})
    report(raw)
    return status


def case_config(case: str, config: Path | None, num_ranks: int, overrides: Sequence[str]) -> RunConfig:
    """The run of one case: the benchmark's own model, or that of a file; two micro-batches a rank.

    Args:
        case: one of ``CASES``.
        config: a run of the user's.
        num_ranks: ranks; the global batch grows with them.
        overrides: ``key=value`` changes of the user's, last.

    Raises:
        UserError: the settings do not fit.
    """
    fixed = ["name=memory", "tracking.wandb.mode=disabled", *CASES[case]]
    loaded = load_config(config or _QUICKSTART, [*([] if config else _MODEL), *fixed, *overrides])
    if loaded.data.tokenizer != TRAINED:
        # Ranks read no text, but a tokenizer that is there already decides how large the vocabulary is.
        vocab_size = vocabulary_size(load_tokenizer(loaded.data.tokenizer))
        loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update={"vocab_size": vocab_size})})
    if not any(override.startswith("batch.global_size=") for override in overrides):
        global_size = loaded.batch.micro_size * _ACCUMULATION_STEPS * num_ranks
        loaded = loaded.model_copy(update={"batch": loaded.batch.model_copy(update={"global_size": global_size})})
    validate(loaded, World(num_ranks, has_gpu=torch.cuda.is_available()))
    return loaded


def report(raw: Path) -> None:
    """Write table and plot beside a raw file, and print the table."""
    write_report(raw, markdown, plot, changes_since_last(raw, series))


if __name__ == "__main__":
    # A batch system's request to end is an interrupt: the table of what was measured is still written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
