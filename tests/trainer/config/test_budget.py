"""Budgets of a run: steps, tokens or epochs, exactly one; and what epochs come to once the samples are counted."""

from pathlib import Path
from typing import Any

import pytest

from sharding.ranks.errors import UserError
from tests.support import ROOT, tiny_values
from trainer.config import RunConfig, config_to_yaml, load_config, parse_config
from trainer.config.budget import budget, budget_of


def _config(**settings: Any) -> RunConfig:
    folder = Path("unused")
    schedule = {"warmup_steps": 0}
    return parse_config(tiny_values(folder, folder, folder) | {"steps": None, "schedule": schedule} | settings, "test")


# A step has 12 samples; as floats, 1.1 x 120 is more than 132.
@pytest.mark.parametrize(
    ("epochs", "samples", "steps"), [(1.0, 120, 10), (1.1, 120, 11), (2.5, 121, 26), (0.001, 120, 1), (3.0, 5, 2)]
)
def test_epochs_become_whole_steps(tmp_path: Path, epochs: float, samples: int, steps: int) -> None:
    config = _config(epochs=epochs)
    assert not config.is_length_known
    counted = config.model_copy(update={"epoch_samples": samples})
    assert (counted.is_length_known, counted.num_steps) == (True, steps)
    assert budget(counted) == ("epochs", f"{epochs:g} = {steps} steps of 12 of {samples} samples")
    # What is said to be needed for so many steps gives as many, and the next step more.
    for num_steps in (1, 7, 1000, 12345):
        needed = float(budget_of(counted, num_steps))
        assert counted.model_copy(update={"epochs": needed}).num_steps == num_steps
    copy = tmp_path / "copy.yaml"
    copy.write_text(config_to_yaml(counted))
    assert load_config(copy) == counted


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 6, "epochs": 1.0}, "but steps=6 and epochs=1.0: set exactly one of them"),
        ({"tokens": 6, "epochs": 1.0}, "but tokens=6 and epochs=1.0: set exactly one of them"),
        ({}, "but none of them is set: set exactly one of them"),
        ({"steps": 6, "epoch_samples": 7}, "epoch_samples=7 goes with epochs only"),
        ({"epochs": 1.0, "data": {"streaming": True}}, "epochs=1.0 goes with data.streaming=false only"),
        (
            {"steps": 6, "schedule": {"warmup_steps": 2, "warmup_fraction": 0.1}},
            "schedule.warmup_fraction=0.1 goes without schedule.warmup_steps only",
        ),
        (
            {"steps": 20, "schedule": {"name": "wsd", "warmup_fraction": 0.5, "decay_steps": 11}},
            r"schedule.warmup_fraction=0.5 = 10 steps \+ schedule.decay_steps=11 is more than the 20 steps",
        ),
        (
            {"steps": 20, "schedule": {"name": "step", "warmup_fraction": 0.5, "milestones": [9]}},
            "must rise, from the 10 steps of warm-up",
        ),
    ],
)
def test_budgets_that_are_none(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        _config(**settings)


def test_rules_of_the_length_wait_for_it() -> None:
    config = _config(epochs=2.0, schedule={"warmup_steps": 40})
    with pytest.raises(UserError, match=r"schedule.warmup_steps=40 is more than the 20 steps"):
        parse_config(config.model_dump(mode="json") | {"epoch_samples": 120}, "test")


@pytest.mark.parametrize(
    ("name", "unit", "of_a_step"), [("digits_mlp", "samples", 64), ("stdlib_lstm", "tokens", 32 * 256)]
)
def test_what_a_step_is_made_of(name: str, unit: str, of_a_step: int) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert (config.data.unit, config.tokens_per_step) == (unit, of_a_step)
