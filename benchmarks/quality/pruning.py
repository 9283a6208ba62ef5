"""What is left of a model once weights are pruned, and by what they are best judged."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality.interval import mean_and_half_width
from sharding.ranks.errors import RunFailure
from trainer.checkpoint.reader import open_checkpoint
from trainer.config import load_config
from trainer.deploy.allowed_code import AllowedCode
from trainer.deploy.prune_run import prune_run
from trainer.evaluation.on_ranks import evaluate_on_started_ranks
from trainer.evaluation.subject import Asked
from trainer.rank import train

PRUNING = "pruning"
"""Runs of equal seeds, dense and half pruned."""

CRITERIA = "pruning-criteria"
"""One dense run, pruned at once by each criterion and to several sparsities."""

NUM_SEEDS = 5
_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_NUM_LANGUAGE_SEEDS = 3
_SPARSITIES = (0.5, 0.8, 0.9)
_RULES = ("magnitude", "importance", "gradient", "random")
_MOST_POINTS = 0.5

_DENSE = [
    *("prune.sparsity=0", "prune.by=magnitude", "prune.scope=global"),
    *("prune.begin=0", "prune.end=0", "prune.every=100"),
]


@dataclass(frozen=True)
class PrunedCase:
    """A configuration that is trained dense and pruned.

    Attributes:
        config: its name in ``configs/``.
        metric: what ``shardline evaluate`` is asked for.
        split: where.
        num_seeds: as many pairs.
        dense: overrides of the dense run.
        pruned: overrides of the pruned run.
        at_once: settings by which the dense run is pruned at once, as by ``shardline prune``.
    """

    config: str
    metric: str
    split: str
    num_seeds: int
    dense: Sequence[str] = ()
    pruned: Sequence[str] = ()
    at_once: Mapping[str, Any] = field(default_factory=lambda: {"sparsity": 0.5})


PRUNED_CASES: dict[str, PrunedCase] = {
    "digits-mlp": PrunedCase("prune_digits", "accuracy", "test", NUM_SEEDS, _DENSE),
    "digits-cnn": PrunedCase(
        "digits_cnn",
        "accuracy",
        "test",
        NUM_SEEDS,
        pruned=["prune.sparsity=0.5", "prune.begin=100", "prune.end=300", "prune.every=50"],
    ),
    "language-model": PrunedCase(
        "prune_stdlib_lm",
        "loss",
        "validation",
        _NUM_LANGUAGE_SEEDS,
        _DENSE,
        at_once={"sparsity": 0.5, "by": "importance", "scope": "layer"},
    ),
}


def measure_pair(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train a case dense and pruned with one seed, and prune the dense run at once; a raw row.

    All of it on one rank, in this process: most runs take less time than a process takes to start.

    Args:
        name: of the case.
        seed: of both runs.
        folder: where runs go.
    """
    case = PRUNED_CASES[name]
    dense = _train(case.config, seed, folder / f"dense-{name}-{seed}", case.dense)
    pruned = _train(case.config, seed, folder / f"pruned-{name}-{seed}", case.pruned)
    at_once = _prune(dense, folder / f"at-once-{name}-{seed}", case.at_once)
    runs = {"dense": dense, "pruned": pruned, "at_once": at_once}
    values = {which: _evaluate(run, case) for which, run in runs.items()}
    return {"kind": PRUNING, "case": f"{PRUNING}-{name}", "seed": seed, **values}


def measure_criteria(seed: int, folder: Path) -> dict[str, Any]:
    """Train the digits' perceptron, and prune it at once by each criterion; a raw row; see ``measure_pair``."""
    case = PRUNED_CASES["digits-mlp"]
    dense = _train(case.config, seed, folder / f"criteria-{seed}", case.dense)
    values = {"dense": _evaluate(dense, case)}
    for rule in _RULES:
        for sparsity in _SPARSITIES:
            pruned = _prune(dense, folder / f"criteria-{seed}-{rule}-{sparsity}", {"by": rule, "sparsity": sparsity})
            values[f"{rule} {sparsity}"] = _evaluate(pruned, case)
    return {"kind": CRITERIA, "case": CRITERIA, "seed": seed, "values": values}


def _train(config: str, seed: int, run: Path, overrides: Sequence[str]) -> Path:
    fixed = [f"output_dir={run.parent}", f"name={run.name}", f"seed={seed}", "tracking.wandb.mode=disabled"]
    with contextlib.redirect_stdout(io.StringIO()):
        result = train(load_config(_CONFIGS / f"{config}.yaml", [*fixed, *overrides]))
    if result.status != "finished":
        # A signal is a request to the run, which saves and returns.
        raise RunFailure(f"{run.name} was stopped after step {result.step}; begin again with --continue.")
    return run


def _prune(dense: Path, run: Path, settings: Mapping[str, Any]) -> Path:
    prune_run(open_checkpoint(str(dense), None), str(dense), run, settings, AllowedCode())
    return run


def _evaluate(run: Path, case: PrunedCase) -> float:
    return float(evaluate_on_started_ranks(Asked(str(run), split=case.split))["metrics"][case.metric])


def pruning_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Both results as Markdown; nothing where neither was measured."""
    return [*_pairs(rows), *_criteria(rows)]


def within_bar(rows: Sequence[Mapping[str, Any]], name: str) -> bool | None:
    """Whether pruned accuracy is, on the mean, at most half a point below the dense; None where that is no bar."""
    if PRUNED_CASES[name].metric != "accuracy":
        return None
    found = [row for row in rows if row.get("case") == f"{PRUNING}-{name}"]
    return sum(row["pruned"] - row["dense"] for row in found) / len(found) >= -_MOST_POINTS / 100


def _pairs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for name, case in PRUNED_CASES.items():
        found = [row for row in rows if row.get("case") == f"{PRUNING}-{name}"]
        if not found:
            continue
        means = [
            f"{mean_and_half_width([row[which] for row in found])[0]:.4f}" for which in ("dense", "at_once", "pruned")
        ]
        mean, half = mean_and_half_width([row["pruned"] - row["dense"] for row in found])
        interval = f"{mean:+.4f} +- {half:.4f}" if len(found) > 1 else f"{mean:+.4f}"
        met = within_bar(rows, name)
        bar = "" if met is None else f"at most {_MOST_POINTS:g} points below ({'met' if met else 'missed'})"
        cells = [name, f"{case.metric}, {case.split}", str(len(found)), *means, interval, bar]
        lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    head = (
        "| half pruned | metric | seeds | dense | pruned at once | while training | difference to dense, 95 % | bar |"
    )
    return ["", head, "| --- " * 8 + "|", *lines]


def _criteria(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [row["values"] for row in rows if row.get("case") == CRITERIA]
    if not found:
        return []
    dense = mean_and_half_width([values["dense"] for values in found])[0]
    lines = [
        "",
        f"Accuracy of the digits' perceptron pruned at once, mean of {len(found)} seeds; dense it is {dense:.4f}.",
        "",
        f"| kept by | {' | '.join(f'{100 * (1 - sparsity):.0f} % left' for sparsity in _SPARSITIES)} |",
        "| --- " * (1 + len(_SPARSITIES)) + "|",
    ]
    for rule in _RULES:
        means = [mean_and_half_width([values[f"{rule} {sparsity}"] for values in found])[0] for sparsity in _SPARSITIES]
        lines.append(f"| {rule} | {' | '.join(f'{mean:.4f}' for mean in means)} |")
    return lines
