"""Which parameters have which settings, and what an optimizer refuses."""

from typing import Any

import pytest
import torch
from torch import nn

from sharding.part import whole_part
from sharding.ranks.errors import UserError
from trainer.config import RunConfig, parse_config
from trainer.config.optimizer import OptimizerConfig, refused_optimizer
from trainer.config.rules import World, validate
from trainer.optimizers.build import optimizer_factory

SHAPES = {
    "embed.weight": (70, 64),
    "blocks.0.up.weight": (64, 64),
    "blocks.1.up.weight": (64, 64),
    "norm.weight": (64,),
}


def _build(values: dict[str, Any]) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    parts = [whole_part(name, tensor) for name, tensor in parameters.items()]
    hidden = [name for name in parameters if name.startswith("blocks")]
    return optimizer_factory(OptimizerConfig.model_validate(values), hidden)(parts), parameters


def _settings(values: dict[str, Any]) -> dict[str, tuple[float, float]]:
    optimizer, parameters = _build(values)
    found = {}
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            (name,) = (name for name, parameter in parameters.items() if parameter is tensor)
            assert name not in found
            found[name] = (group["lr_scale"], group["weight_decay"])
    return found


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "adafactor", "adamw8bit"])
def test_the_first_pattern_that_matches_has_the_parameter(name: str) -> None:
    assert _settings({"name": name, "weight_decay": 0.2}) == {
        "embed.weight": (1.0, 0.2),
        "blocks.0.up.weight": (1.0, 0.2),
        "blocks.1.up.weight": (1.0, 0.2),
        "norm.weight": (1.0, 0.0),
    }
    groups = [
        {"pattern": "blocks.0.*", "lr_scale": 0.5},
        {"pattern": "*.up.weight", "weight_decay": 0.0},
        {"pattern": "norm*", "lr_scale": 2.0, "weight_decay": 0.3},
    ]
    assert _settings({"name": name, "weight_decay": 0.2, "groups": groups}) == {
        "embed.weight": (1.0, 0.2),
        "blocks.0.up.weight": (0.5, 0.2),
        "blocks.1.up.weight": (1.0, 0.0),
        "norm.weight": (2.0, 0.3),
    }


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["block.0.*"],
            r"optimizer\.groups\.0\.pattern=block\.0\.\* matches no trained parameter; the nearest .* blocks\.0\.up",
        ),
        (
            ["*", "norm.weight"],
            r"optimizer\.groups\.1\.pattern=norm\.weight matches only .* earlier group .* norm\.weight",
        ),
    ],
)
def test_a_pattern_without_parameters_is_refused(patterns: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _build({"groups": [{"pattern": pattern} for pattern in patterns]})


@pytest.mark.parametrize(("name", "message"), [("muon", "this model has none"), ("adamw8bit", "no parameter of this")])
def test_an_optimizer_without_its_kind_of_parameter_is_refused(name: str, message: str) -> None:
    vector = whole_part("norm", nn.Parameter(torch.ones(8)))
    with pytest.raises(UserError, match=message):
        optimizer_factory(OptimizerConfig.model_validate({"name": name}), ())([vector])


def _config(values: dict[str, Any], optimizer: dict[str, Any]) -> RunConfig:
    return parse_config(values | {"optimizer": optimizer}, "test")


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            {"momentum": 0.5},
            r"optimizer\.momentum=0\.5 goes with .* but it is adamw; .* set optimizer\.name=sgd\.",
        ),
        (
            {"name": "sgd", "betas": [0.9, 0.99]},
            r"optimizer\.betas=.*=adamw, adamw8bit or muon only",
        ),
        (
            {"name": "adafactor", "muon": {"nesterov": False}},
            r"optimizer\.muon\.nesterov=false goes .*is adafactor",
        ),
        ({"name": "muon", "adafactor": {"eps": 1e-5}}, r"optimizer\.adafactor\.eps=1e-05 goes with"),
        ({"name": "muon", "muon": {"momentum": 0.0}}, r"optimizer\.muon\.nesterov=true needs"),
    ],
)
def test_settings_without_effect_are_refused(values: dict[str, Any], optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _config(values, optimizer)


def test_settings_with_effect_are_not(values: dict[str, Any]) -> None:
    _config(values, {"name": "muon", "betas": [0.9, 0.99], "muon": {"nesterov": False}})
    _config(values, {"name": "adafactor", "adafactor": {"eps": 1e-5}})


def test_eight_bits_need_torchao(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(values, {"name": "adamw8bit"})
    validate(config, World(2, has_gpu=False))
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(UserError, match=r"needs torchao, .*shardline\[eight-bit\]"):
        validate(config, World(2, has_gpu=False))


def test_what_other_backends_cannot_carry() -> None:
    for name in ("muon", "adafactor", "adamw8bit"):
        assert refused_optimizer(name, "torch") is None  # type: ignore[arg-type]
        assert refused_optimizer(name, "accelerate") is None  # type: ignore[arg-type]
        assert "flat vector" in (refused_optimizer(name, "deepspeed") or "")  # type: ignore[arg-type]
        assert "the bucketed engine" in (refused_optimizer(name, "bucketed") or "")  # type: ignore[arg-type]
    assert refused_optimizer("adamw", "deepspeed") is None
    assert refused_optimizer("sgd", "bucketed") is None
