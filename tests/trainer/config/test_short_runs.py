"""A few steps of any run: nothing is judged, and the rate is that of the run's own beginning."""

from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, write_config
from trainer.config import load_config
from trainer.config.short_runs import UNJUDGED, beginning_of_schedule

_EXAMPLES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", _EXAMPLES, ids=lambda path: path.stem)
def test_a_few_steps_of_each_example(path: Path) -> None:
    whole = load_config(path)
    settings = ["steps=5", "tokens=null", "epochs=null", "checkpoint.every_steps=4", *UNJUDGED]
    short = load_config(path, [*settings, *beginning_of_schedule(whole, 5)])
    assert short.schedule.total_steps == (whole.schedule.total_steps or whole.num_steps)
    assert short.evaluation.patience == short.checkpoint.keep_best == 0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "constant", "warmup_steps": 2}, []),
        ({"name": "constant", "warmup_steps": 9}, ["schedule.warmup_steps=5"]),
        ({"name": "inverse_sqrt", "warmup_fraction": 0.5}, []),
        ({"name": "step", "decay_every_steps": 4}, []),
        ({"name": "linear", "warmup_steps": 9}, ["schedule.total_steps=40"]),
        ({"name": "cosine", "total_steps": 30}, ["schedule.total_steps=30"]),
    ],
)
def test_a_curve_without_an_end(
    schedule: dict[str, Any], expected: list[str], values: dict[str, Any], tmp_path: Path
) -> None:
    path = write_config(tmp_path / "run.yaml", values | {"steps": 40, "schedule": schedule})
    settings = beginning_of_schedule(load_config(path), 5)
    assert settings == expected
    assert load_config(path, ["steps=5", *settings]).num_steps == 5
