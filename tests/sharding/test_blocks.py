"""Layers that are found, and those that are not and must be."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from sharding.blocks import find_blocks, refuse_scattered_layers
from sharding.build_engine import build_engine
from sharding.config import (
    ActivationCheckpointingConfig,
    CompileConfig,
    ParallelConfig,
    PrecisionConfig,
    Strategy,
)
from sharding.engine import ModelDefinition
from sharding.mesh import build_mesh
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.support import run_on_ranks
from trainer.config.optimizer import OptimizerConfig
from trainer.optimizers.build import optimizer_factory


def _layer(width: int = 8) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 2, 16)


class _Scale(nn.Module):
    """A layer without children."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))


class _Attributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 8)
        self.layer0, self.layer1 = _layer(), _layer()


class _Adapted(nn.Module):
    """Layers in a list, and two small modules alike beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_layer(), _layer()])
        self.before, self.after = (nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8)) for _ in range(2))


class _Towers(nn.Module):
    """Two encoders alike, whose layers are in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = _Adapted(), _Adapted()


_FOUND = (
    _Adapted(),
    _Towers(),
    nn.ModuleList([nn.ModuleList([_layer(), _layer()])]),
    nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8)),
    nn.Sequential(OrderedDict(first=_layer(8), second=_layer(16))),
)
_SCATTERED = (
    (_Attributes(), "_Attributes has 2 layers alike (layer0, layer1 ...)"),
    (nn.Sequential(_layer(), _layer(), _layer()), "Sequential has 3 layers alike (0, 1 ...)"),
    (nn.ModuleDict({"a": _layer(), "b": _layer()}), "ModuleDict has 2 layers alike (a, b ...)"),
    (nn.Sequential(_Scale(), _Scale()), "Sequential has 2 layers alike (0, 1 ...)"),
    (
        nn.ModuleDict({"few": nn.ModuleList([_Scale()]), "most": nn.Sequential(_layer(), _layer())}),
        "ModuleDict has 2 layers alike (most.0, most.1 ...)",
    ),
)


@pytest.mark.parametrize("strategy", ["zero3", "hsdp"])
def test_repeated_layers_in_no_list_are_refused(strategy: str) -> None:
    for model in _FOUND:
        refuse_scattered_layers(model, strategy)
    for model, found in _SCATTERED:
        with pytest.raises(UserError) as error:
            refuse_scattered_layers(model, strategy)
        assert found in str(error.value)
        assert "use parallel.strategy=zero2" in str(error.value)


def test_stages_that_gather_all_once_take_any_model() -> None:
    for model, _ in _SCATTERED:
        refuse_scattered_layers(model, "zero2")


def test_a_list_of_layers_is_found_below_others() -> None:
    assert [name for name, _ in find_blocks(_Towers())] == [
        f"{tower}.layers.{index}" for tower in ("query", "document") for index in range(2)
    ]


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4)])
        self.outside = nn.GRU(4, 4)

    def forward(self) -> None:
        """Nothing is computed."""


def _build_recurrent(ranks: Ranks) -> None:
    strategies: tuple[Strategy, ...] = ("none", "ddp", "zero2", "zero3")
    for strategy in strategies:
        with torch.device("meta"):
            model = _Recurrent()
        layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
        parallel = ParallelConfig(strategy=strategy)
        build_engine(
            ModelDefinition(model, initialize_module, lambda *_: torch.zeros(()), lambda *_: torch.zeros(()), 1),
            build_mesh(parallel, ranks),
            ranks.device,
            optimizer_factory(OptimizerConfig(), ()),
            parallel=parallel,
            precision=PrecisionConfig(compute="fp32"),
            activation_checkpointing=ActivationCheckpointingConfig(),
            compilation=CompileConfig(),
            deepspeed_settings={},
        )
        assert [("flatten_parameters" in vars(layer)) for layer in layers] == [True] * 3


def initialize_module(module: nn.Module) -> None:
    """As the modules themselves do."""
    if isinstance(module, nn.RNNBase):
        module.reset_parameters()


def test_recurrent_layers_keep_no_copy_of_their_weights() -> None:
    # On a GPU the first forward pass would make the copy, and every later one compute with it.
    run_on_ranks(_build_recurrent, 1)
