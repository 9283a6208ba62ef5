"""``shardline bench startup``: from the command to the end of the first step, beside torchrun with a bare script.

``python -m benchmarks.startup [--rounds 9] [--nproc N] [--output FOLDER] [--report FILE]
[key=value ...]``

The quickstart's model takes one step, on a corpus that is prepared: started by ``shardline run``, and by ``torchrun``
with ``benchmarks/contestants/bare_script.py``, which trains the same model on random tokens. See docs/benchmarks.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure.comparison import Series
from benchmarks.measure.driver import Benchmark, num_ranks_of, run_as_program
from benchmarks.measure.protocol import order_of_round, quartiles
from benchmarks.presentation.facts import facts
from benchmarks.presentation.plots import Bar, bars
from benchmarks.presentation.result_files import Rows, append_row, raw_file
from sharding.ranks.errors import RunFailure, UserError, ends_with_a_sentence
from trainer.architectures.config import build_model_config
from trainer.config import RunConfig, load_config
from trainer.config.rules import World, validate
from trainer.data.packed import sample_facts
from trainer.data.prepare import prepare_corpus

SHARDLINE, BARE = "shardline run", "torchrun with a bare script"
MAX_DIFFERENCE_S = 2.0
"""Target: what `shardline run` may take longer."""

_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed")
_ROOT = Path(__file__).resolve().parents[2]
_FIRST_STEP = re.compile(r"step 1(/2)?  loss")
_TIMEOUT_S = 300.0
_TITLE = "From the command to the first step"


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Measure, write raw times and a table, and print the table; returns the exit status."""
    parser = _BENCHMARK.parser()
    parser.add_argument("--rounds", type=int, default=9, help="starts of each; one more of each is discarded")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the run")
    options = parser.parse_intermixed_args(arguments)
    return _BENCHMARK.run(options, _start)


def _start(options: argparse.Namespace) -> int:
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds}: at least 1 start is needed that is not discarded; raise it.")
    num_ranks = num_ranks_of(options)
    raw = raw_file(options.output, "startup", num_ranks, has_gpu=torch.cuda.is_available())
    with tempfile.TemporaryDirectory(prefix=".startup-", dir=options.output) as folder:
        _measure(Path(folder), options, num_ranks, raw)
    _BENCHMARK.report(raw)
    return 0


def _measure(folder: Path, options: argparse.Namespace, num_ranks: int, raw: Path) -> None:
    fixed = [
        f"output_dir={folder}",
        # Evaluation at the last step comes before its line.
        "steps=2",
        "schedule.total_steps=1000",
        f"parallel.strategy={'ddp' if num_ranks > 1 else 'none'}",
        "metrics.every_steps=1",
        "evaluation.every_steps=0",
        "checkpoint.every_steps=0",
        "tracking.wandb.mode=disabled",
    ]
    path = _ROOT / "configs" / "quickstart.yaml"
    overrides = [*fixed, *options.overrides]
    config = load_config(path, overrides)
    validate(config, World(num_ranks, has_gpu=torch.cuda.is_available()))
    commands = {
        SHARDLINE: [sys.executable, "-m", "launcher", "run", str(path), f"--nproc-per-node={num_ranks}", *overrides],
        BARE: _bare_command(config, num_ranks),
    }
    setup = {"overrides": options.overrides}
    append_row(raw, _BENCHMARK.header(setup, num_ranks=num_ranks, commands=commands))
    for round_index in range(options.rounds + 1):
        times_s = {}
        for name in order_of_round(list(commands), round_index, seed=0):
            extra = [f"name=start-{round_index}"] if name == SHARDLINE else []
            times_s[name] = time_to_first_step([*commands[name], *extra])
        # The first one finds files that are not in the page cache.
        append_row(raw, {"kind": "round" if round_index else "warmup", "wall_s": times_s})
        print(
            f"{round_index} of {options.rounds}: " + ", ".join(f"{n} {t:.2f} s" for n, t in times_s.items()), flush=True
        )


def _bare_command(config: RunConfig, num_ranks: int) -> list[str]:
    corpus = prepare_corpus(config.data)
    facts = sample_facts(corpus, config.data)
    fields = build_model_config(config.model, facts).to_diff_dict()
    script = str(_ROOT / "benchmarks" / "contestants" / "bare_script.py")
    sizes = [str(config.batch.micro_size), str(config.data.sequence_length)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return [*launcher, script, json.dumps(fields), *sizes]


def time_to_first_step(command: Sequence[str]) -> float:
    """Seconds from a command's start to its line about the first step's loss; then it is seen to its end.

    Raises:
        RunFailure: it ended without that line.
    """
    environment = os.environ | {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    began_at = time.perf_counter()
    first_s = None
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if first_s is None and _FIRST_STEP.match(line):
                first_s = time.perf_counter() - began_at
        status = process.wait(_TIMEOUT_S)
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if first_s is None or status:
        reason = said[-1] if said else "no message"
        raise RunFailure(f"{command[3]} ended with {status} and no step: {reason}")
    return first_s


def series(rows: Rows) -> dict[str, Series]:
    """What a repeated result is compared by: times of `shardline run` over those of torchrun with a bare script."""
    rounds = _rounds(rows)
    return {SHARDLINE: Series([one[SHARDLINE] for one in rounds], [one[BARE] for one in rounds])}


def markdown(rows: Rows, file: str, changes: Sequence[str] = ()) -> str:
    """The result as Markdown.

    Args:
        rows: what the raw file holds.
        file: name of the raw file.
        changes: lines that say what has changed since the last result.
    """
    header = rows[0]
    rounds = _rounds(rows)
    if not rounds:
        return "\n".join([*facts(header, _TITLE), "", "Interrupted before anything can be said."]) + "\n"
    lines = [*facts(header, _TITLE), ""]
    lines += [f"{header['num_ranks']} ranks, {len(rounds)} starts each, taking turns.", ""]
    lines += ["| | median, s | quartiles, s |", "| --- | --- | --- |"]
    for name in (BARE, SHARDLINE):
        low, middle, high = quartiles([one[name] for one in rounds])
        lines.append(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    difference_s = median(one[SHARDLINE] - one[BARE] for one in rounds)
    lines += [
        "",
        f"`{SHARDLINE}` takes {difference_s:+.2f} s (median of the pairs; target: at most +{MAX_DIFFERENCE_S:g}).",
    ]
    if changes:
        lines += ["", *changes]
    return "\n".join([*lines, "", f"Raw times: `{file}`."]) + "\n"


def plot(rows: Rows) -> str:
    """Both times, as SVG."""
    rounds, found = _rounds(rows), []
    for name in (BARE, SHARDLINE) if rounds else ():
        low, middle, high = quartiles([one[name] for one in rounds])
        found.append(Bar(name, middle, low, high))
    return bars(found, "s from the command to the first step, median and quartiles", 2)


def _rounds(rows: Rows) -> list[dict[str, float]]:
    return [row["wall_s"] for row in rows if row["kind"] == "round"]


_BENCHMARK = Benchmark("startup", _PACKAGES, markdown, plot, series)

if __name__ == "__main__":
    run_as_program(main)
