"""Scores over seeds, and what they are compared with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.presentation.result_files import read_rows
from benchmarks.quality.__main__ import main
from benchmarks.quality.baselines import measure_baseline
from benchmarks.quality.interval import mean_and_half_width
from benchmarks.quality.table import markdown, met_bar, plot
from tests.benchmarks.header import result_header
from tests.support import ROOT
from trainer.config import load_config

HEADER = result_header("quality", num_ranks=2)


_SHARES = (0.5, 0.8, 0.9)


def scores(case: str, *values: float) -> list[dict[str, Any]]:
    return [
        {"kind": "run", "case": case, "seed": seed, "value": value, "wall_s": 30.0} for seed, value in enumerate(values)
    ]


def quantized_rows(method: str, *after: float) -> list[dict[str, Any]]:
    row: dict[str, Any] = {"kind": "quantized", "case": "digits-mlp", "method": method, "metric": "loss"}
    row["size_bytes"] = {"before": 400, "after": 100}
    row["speed"] = [{"batch_size": size, "ratio": {"value": ratio}} for size, ratio in ((1, 1.5), (32, 0.75))]
    return [
        row | {"seed": seed, "metrics": {"accuracy": {"before": 0.96, "after": value}}}
        for seed, value in enumerate(after)
    ]


@pytest.mark.parametrize("num_values", [2, 5, 15, 16, 40])
def test_the_interval_is_students(num_values: int) -> None:
    values = np.random.default_rng(num_values).normal(size=num_values)
    mean, half = mean_and_half_width(values.tolist())
    low, high = stats.t.interval(0.95, num_values - 1, loc=values.mean(), scale=stats.sem(values))
    assert mean == pytest.approx(values.mean())
    # Beyond what is tabulated the normal distribution stands for it.
    assert half == pytest.approx((high - low) / 2, rel=1e-3 if num_values <= 15 else 0.09)


def test_the_table_says_what_is_met_and_what_is_missed() -> None:
    outcome = {"teacher": 0.97, "distilled": 0.95, "alone": 0.9}
    rows = [
        HEADER,
        *scores("digits-mlp", 0.96, 0.98, 0.97, 0.975, 0.985),
        *scores("digits-cnn", 0.98, 0.98),
        {"kind": "baseline", "case": "text", "what": "TF-IDF", "value": 0.9},
        *scores("text", 0.86, 0.84),
        *({"kind": "distillation", "case": "distillation", "seed": seed, **outcome} for seed in range(4)),
        *({"kind": "transfer", "case": "transfer", "seed": s, "scratch": 0.5, "transferred": 0.6} for s in range(3)),
        *quantized_rows("int8-dynamic", 0.96, 0.957, 0.96),
        *quantized_rows("int4-weight", 0.95, 0.94, 0.93),
    ]
    table = markdown(rows, "quality.jsonl")
    assert "| digits-mlp | accuracy, test | 5 | 0.9740 +- 0.0119 | 0.9600 |  | at least 0.97 (met) | 30 |" in table
    assert "| at least 0.985 (missed) | 30 |" in table
    assert "| TF-IDF: 0.9000 | within 5 points (met) | 30 |" in table
    assert "3 pairs" in table
    assert "the difference is +0.1000 +- 0.0000" in table
    assert "Distillation, 4 pairs of equal seeds and steps" in table
    assert "a teacher (0.9700) reaches an accuracy of 0.9500, alone 0.9000; the difference is +0.0500 +- 0.0" in table
    assert "| digits-mlp | int8-dynamic | accuracy | 3 | 0.9600 | 0.9590 | -0.0010 +- 0.0043 | met |" in table
    assert "| 0.9600 | 0.9400 | -0.0200 +- 0.0248 | missed | x 0.25 | x 1.50 | x 0.75 |" in table
    assert plot(rows).startswith("<?xml")
    assert "Interrupted before anything can be said" in markdown([HEADER], "quality.jsonl")
    assert met_bar("masked-lm", [5.0], 6.0) is True
    assert met_bar("masked-lm", [6.5], 6.0) is False
    assert met_bar("tones", [0.5], None) is None


def test_pruned_runs_stand_beside_dense_ones() -> None:
    def pairs(case: str, *values: tuple[float, float]) -> list[dict[str, Any]]:
        return [
            {"kind": "pruning", "case": f"pruning-{case}", "seed": seed, "dense": a, "at_once": a / 2, "pruned": b}
            for seed, (a, b) in enumerate(values)
        ]

    criteria = {
        f"{rule} {share}": 0.25 for rule in ("magnitude", "importance", "gradient", "random") for share in _SHARES
    }
    rows = [
        HEADER,
        *pairs("digits-mlp", (0.98, 0.976), (0.97, 0.968)),
        *pairs("digits-cnn", (0.99, 0.98), (0.99, 0.984)),
        *pairs("language-model", (5.0, 5.2)),
        {"kind": "pruning-criteria", "case": "pruning-criteria", "seed": 0, "values": {"dense": 0.9, **criteria}},
    ]
    table = markdown(rows, "quality.jsonl")
    assert (
        "| digits-mlp | accuracy, test | 2 | 0.9750 | 0.4875 | 0.9720 | -0.0030 +- 0.0127 | at most 0.5 points" in table
    )
    assert "points below (met) |" in table
    assert "points below (missed) |" in table
    assert "| language-model | loss, validation | 1 | 5.0000 | 2.5000 | 5.2000 | +0.2000 |  |" in table
    assert "| gradient | 0.2500 | 0.2500 | 0.2500 |" in table


def test_a_baseline_learns_from_the_training_rows_of_the_run(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "digits_mlp.yaml", [f"data.cache_dir={tmp_path}"])
    what, accuracy = measure_baseline("linear", config, "test")
    assert what == "logistic regression, accuracy"
    assert 0.94 < accuracy < 0.99


@pytest.mark.timeout(200)
def test_it_trains_and_evaluates_and_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "digits-mlp", "--seeds", "1", "--nproc", "1", "--output", str(tmp_path)]) == 0
    (raw,) = tmp_path.glob("*/quality.jsonl")
    runs = [row for row in read_rows(raw) if row["kind"] == "run"]
    assert [run["seed"] for run in runs] == [0]
    assert 0.95 < runs[0]["value"] < 1
    assert main(["--only", "digits-mlp", "--seeds", "1", "--nproc", "1", "--continue", str(raw)]) == 0
    assert [row for row in read_rows(raw) if row["kind"] == "run"] == runs
    assert main(["--only", "nothing"]) == 2
    assert "there is no case nothing; there are digits-mlp" in capsys.readouterr().err
