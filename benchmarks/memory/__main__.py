"""``shardline bench memory``: bytes that each rank holds, measured beside the formula of its strategy.

``python -m benchmarks.memory [--config FILE] [--cases ddp,zero1,...] [--nproc N] [--output FOLDER] [--report FILE]
[key=value ...]``

Each case, an engine with a strategy, is built on all ranks and takes some steps while every allocation is recorded. See
docs/benchmarks.md.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measure.driver import Benchmark, measure_on_ranks, num_ranks_of, run_as_program
from benchmarks.memory.rank import MemoryAssignment
from benchmarks.memory.table import markdown, plot, series
from benchmarks.presentation.result_files import append_row, raw_file
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
    "bucketed-zero1": ["parallel.strategy=zero1", "parallel.backend=bucketed"],
    "bucketed-zero2": ["parallel.strategy=zero2", "parallel.backend=bucketed"],
    "bucketed-zero3": ["parallel.strategy=zero3", "parallel.backend=bucketed"],
    "hsdp": ["parallel.strategy=hsdp", "parallel.replicate=2"],
    "bucketed-hsdp": ["parallel.strategy=hsdp", "parallel.replicate=2", "parallel.backend=bucketed"],
    "accelerate-ddp": ["parallel.strategy=ddp", "parallel.backend=accelerate"],
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
_BENCHMARK = Benchmark("memory", _PACKAGES, markdown, plot, series)
_QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Measure, write raw numbers, a table and a plot, and print the table; returns the exit status."""
    parser = _BENCHMARK.parser()
    parser.add_argument("--config", type=Path, help="a run of your own in place of the benchmark's")
    parser.add_argument("--cases", default="", help="separated by commas; default: all that so many ranks can divide")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the run")
    return _BENCHMARK.run(parser.parse_intermixed_args(arguments), _measure)


def _measure(options: argparse.Namespace) -> int:
    has_gpu = torch.cuda.is_available()
    num_ranks = num_ranks_of(options)
    chosen = options.cases.split(",") if options.cases else _cases_of(num_ranks)
    unknown = [case for case in chosen if case not in CASES]
    if unknown:
        raise UserError(f"--cases {options.cases}: there is no case {unknown[0]}; there are {', '.join(CASES)}.")
    configs = {case: case_config(case, options.config, num_ranks, options.overrides) for case in chosen}
    threads = threads_per_rank(configs[chosen[0]], num_ranks, os.environ)
    values = {case: config.model_dump(mode="json", by_alias=True) for case, config in configs.items()}
    raw = raw_file(options.output, "memory", num_ranks, has_gpu=has_gpu)
    setup = {"config": str(options.config or "memory"), "overrides": options.overrides}
    append_row(raw, _BENCHMARK.header(setup, num_ranks=num_ranks, threads=threads, config=values[chosen[0]]))
    assignment = MemoryAssignment(values, threads, str(raw))
    status = measure_on_ranks("benchmarks.memory.rank", assignment, num_ranks, raw)
    _BENCHMARK.report(raw)
    return status


def _cases_of(num_ranks: int) -> list[str]:
    """Cases that so many ranks can divide: replicas of shards are of four ranks or more."""
    return [case for case in CASES if "hsdp" not in case or (num_ranks >= 4 and num_ranks % 2 == 0)]


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


if __name__ == "__main__":
    run_as_program(main)
