"""``shardline bench quality``: how well the examples learn, over several seeds, beside what is known to be good.

``python -m benchmarks.quality [--only NAMES] [--seeds N] [--pairs N] [--nproc N] [--output FOLDER] [--report FILE]``

Every case trains a configuration of ``configs/`` by ``shardline run`` once for each seed, and asks ``shardline
evaluate`` for one number. Each run takes up to two minutes on two processors; a raw file that was interrupted goes on
with ``--continue FILE``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measure.driver import Benchmark, num_ranks_of, run_as_program
from benchmarks.presentation.result_files import append_row, raw_file, read_rows
from benchmarks.quality.baselines import measure_baseline
from benchmarks.quality.cases import (
    CASES,
    DISTILLATION,
    NUM_PAIRS,
    NUM_TRIPLES,
    STUDENT_CONFIG,
    TEACHER_CONFIG,
    TEACHER_OVERRIDES,
    TRANSFER,
    TRANSFER_BASE,
    TRANSFER_CONFIG,
    Case,
)
from benchmarks.quality.pruning import CRITERIA, NUM_SEEDS, PRUNED_CASES, PRUNING, measure_criteria, measure_pair
from benchmarks.quality.quantized import QUANTIZED_CASES, measure_quantized
from benchmarks.quality.table import markdown, plot
from sharding.ranks.errors import RunFailure, UserError, ends_with_a_sentence
from trainer.config import load_config

_PACKAGES = ("torch", "transformers", "scikit-learn", "onnx", "onnxruntime", "torchao")
_ROOT = Path(__file__).resolve().parents[2]
_QUANTIZED = "quantized"
_ALL = (*CASES, TRANSFER, DISTILLATION, PRUNING, CRITERIA, _QUANTIZED)


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Measure, write raw scores and a table, and print the table; returns the exit status."""
    parser = _BENCHMARK.parser()
    parser.add_argument("--only", default=",".join(_ALL), help="cases, separated by commas")
    parser.add_argument("--seeds", type=int, default=0, help="runs of each case; 0 means what the case says")
    parser.add_argument(
        "--pairs", type=int, default=0, help="pairs of runs of transfer and distillation; 0 means as many as there are"
    )
    parser.add_argument("--continue", dest="raw", type=Path, metavar="FILE", help="a raw file that is not whole")
    return _BENCHMARK.run(parser.parse_args(arguments), _start)


def _start(options: argparse.Namespace) -> int:
    names = options.only.split(",")
    unknown = [name for name in names if name not in _ALL]
    if unknown:
        raise UserError(f"--only {options.only}: there is no case {unknown[0]}; there are {', '.join(_ALL)}.")
    num_ranks = num_ranks_of(options)
    raw: Path = options.raw or raw_file(options.output, "quality", num_ranks, has_gpu=torch.cuda.is_available())
    if options.raw is None:
        append_row(raw, _BENCHMARK.header({"num_ranks": num_ranks}, num_ranks=num_ranks))
    with tempfile.TemporaryDirectory(prefix=".quality-", dir=raw.parent) as folder:
        measured = _Measured(raw, Path(folder), num_ranks)
        for name in names:
            if name == TRANSFER:
                for seed in range(options.pairs or NUM_PAIRS):
                    measured.pair(seed)
            elif name in (PRUNING, CRITERIA):
                measured.pruning(name, options.seeds)
            elif name == DISTILLATION:
                for seed in range(options.pairs or NUM_TRIPLES):
                    measured.triple(seed)
            elif name == _QUANTIZED:
                for case in QUANTIZED_CASES:
                    measured.quantized(case, options.seeds or CASES[case].num_seeds)
            else:
                measured.case(name, options.seeds or CASES[name].num_seeds)
    _BENCHMARK.report(raw)
    return 0


class _Measured:
    """A raw file, and what it has already."""

    def __init__(self, raw: Path, folder: Path, num_ranks: int) -> None:
        self._raw = raw
        self._folder = folder
        self._num_ranks = num_ranks
        rows = [row for row in read_rows(raw) if row["kind"] != "header"]
        self._done = {(row.get("case"), row.get("seed")) for row in rows if row["kind"] != _QUANTIZED}
        self._quantized = {(row["case"], row["seed"]) for row in rows if row["kind"] == _QUANTIZED}

    def case(self, name: str, num_seeds: int) -> None:
        """Train a case once for each seed, and measure what it is compared with."""
        case = CASES[name]
        if case.baseline is not None and (name, None) not in self._done:
            what, value = measure_baseline(case.baseline, load_config(_path(case.config)), case.split)
            append_row(self._raw, {"kind": "baseline", "case": name, "what": what, "value": value})
            print(f"{name}: {what} {value:.4f}", flush=True)
        for seed in range(num_seeds):
            if (name, seed) not in self._done:
                self._run(case, name, seed)

    def pair(self, seed: int) -> None:
        """Train a classifier on a masked language model, and one from scratch, with the same seed."""
        if (TRANSFER, seed) in self._done:
            return
        base = self._train(TRANSFER_BASE, seed, [])
        export = base / "export"
        _shardline("export", str(base), "--to", str(export))
        # The same model and tokenizer without what was learnt.
        config = load_config(_path(TRANSFER_BASE)).model
        scratch = [f"model.architecture={config.architecture}", f"model.config={json.dumps(config.config)}"]
        scratch += ["model.pretrained=null", "model.new_head=false", f"data.tokenizer={export}"]
        ends = {"transferred": [f"model.pretrained={export}"], "scratch": scratch}
        values = {}
        for which, overrides in ends.items():
            run = self._train(TRANSFER_CONFIG, seed, [f"name={which}-{seed}", *overrides])
            values[which] = _evaluate(run, "test", "accuracy")
        append_row(self._raw, {"kind": TRANSFER, "case": TRANSFER, "seed": seed, **values})
        print(f"transfer, seed {seed}: " + ", ".join(f"{which} {v:.4f}" for which, v in values.items()), flush=True)

    def pruning(self, name: str, num_seeds: int) -> None:
        """Compare pruned runs with dense ones; with 0 over as many seeds as each case says."""
        if name == CRITERIA:
            for seed in range(num_seeds or NUM_SEEDS):
                if (CRITERIA, seed) not in self._done:
                    append_row(self._raw, measure_criteria(seed, self._folder))
                    print(f"{CRITERIA}, seed {seed}", flush=True)
            return
        for case, pruned in PRUNED_CASES.items():
            for seed in range(num_seeds or pruned.num_seeds):
                if (f"{PRUNING}-{case}", seed) not in self._done:
                    row = measure_pair(case, seed, self._folder)
                    append_row(self._raw, row)
                    print(f"{PRUNING} of {case}, seed {seed}: {row['dense']:.4f}, {row['pruned']:.4f}", flush=True)

    def triple(self, seed: int) -> None:
        """Train a teacher, a student that learns from it, and the same student alone, with the same seed."""
        if (DISTILLATION, seed) in self._done:
            return
        teacher = self._train(TEACHER_CONFIG, seed, [f"name=teacher-{seed}", *TEACHER_OVERRIDES])
        values = {"teacher": _evaluate(teacher, "test", "accuracy")}
        for which, name in (("distilled", str(teacher)), ("alone", "null")):
            run = self._train(STUDENT_CONFIG, seed, [f"name={which}-{seed}", f"distill.teacher={name}"])
            values[which] = _evaluate(run, "test", "accuracy")
        append_row(self._raw, {"kind": DISTILLATION, "case": DISTILLATION, "seed": seed, **values})
        print(f"distillation, seed {seed}: " + ", ".join(f"{which} {v:.4f}" for which, v in values.items()), flush=True)

    def quantized(self, name: str, num_seeds: int) -> None:
        """Train a case once for each seed, and quantize an export of it by every method."""
        case = CASES[name]
        for seed in range(num_seeds):
            if (name, seed) in self._quantized:
                continue
            run = self._train(case.config, seed, [])
            for found in measure_quantized(run, case.split):
                append_row(self._raw, {"kind": _QUANTIZED, "case": name, "seed": seed, **found})
                print(f"{name}, seed {seed}: {found['method']} {found['metrics'][found['metric']]}", flush=True)

    def _run(self, case: Case, name: str, seed: int) -> None:
        began_at = time.monotonic()
        run = self._train(case.config, seed, [])
        wall_s = time.monotonic() - began_at
        value = _evaluate(run, case.split, case.metric)
        append_row(self._raw, {"kind": "run", "case": name, "seed": seed, "value": value, "wall_s": wall_s})
        print(f"{name}, seed {seed}: {case.metric} {value:.4f} in {wall_s:.0f} s", flush=True)

    def _train(self, config: str, seed: int, overrides: Sequence[str]) -> Path:
        fixed = [f"output_dir={self._folder}", f"seed={seed}", "tracking.wandb.mode=disabled", f"name={config}-{seed}"]
        ranks = f"--nproc-per-node={self._num_ranks}"
        _shardline("run", str(_path(config)), ranks, *fixed, *overrides)
        named = [text.partition("=")[2] for text in (*fixed, *overrides) if text.startswith("name=")]
        return self._folder / named[-1]


def _evaluate(run: Path, split: str, metric: str) -> float:
    answer = json.loads(_shardline("evaluate", str(run), "--split", split, "--json"))
    return float(answer["metrics"][metric])


def _shardline(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "launcher", *arguments], capture_output=True, text=True, cwd=_ROOT)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RunFailure(f"shardline {arguments[0]} ended with {done.returncode}: {said[-1] if said else 'no message'}")
    return done.stdout


def _path(config: str) -> Path:
    return _ROOT / "configs" / f"{config}.yaml"


_BENCHMARK = Benchmark("quality", _PACKAGES, markdown, plot)

if __name__ == "__main__":
    run_as_program(main)
