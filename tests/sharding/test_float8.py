"""Products in 8 bits: one layer by hand, every engine beside one process, and who is refused."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchao.float8.float8_linear import Float8Linear

from sharding.config import Float8Recipe
from sharding.float8 import check_float8, convert_linear_layers
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import FACTS, tiny_config, tiny_engine, train_steps
from tests.support import run_on_ranks
from trainer.architectures.config import build_model_config
from trainer.model.engine import describe_model
from trainer.model.models import build_model_on_meta, model_facts
from trainer.tasks.registry import build_task

_CPU = torch.device("cpu")
_ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=_CPU)
_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_RECIPES: tuple[Float8Recipe, ...] = ("tensorwise", "rowwise")
# Sizes that are multiples of 16.
_MODEL = {
    "architecture": "llama",
    "config": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
}


def _losses(ranks: Ranks, strategy: str, recipe: Float8Recipe = "tensorwise", **settings: Any) -> list[float]:
    precision = {"compute": "fp8", "fp8_recipe": recipe}
    return train_steps(tiny_engine(ranks, strategy, **{"model": _MODEL, "precision": precision} | settings), ranks)


def _rounded(values: torch.Tensor, recipe: Float8Recipe, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Values as 8 bits hold them, scaled so that the largest is the largest there is: of all, or along a dimension.

    Scales along a dimension are powers of two, by which nothing is rounded.
    """
    if recipe == "tensorwise":
        scale = torch.finfo(dtype).max / values.abs().max()
    else:
        scale = 2 ** (torch.finfo(_E4M3).max / values.abs().amax(dim, keepdim=True)).log2().floor()
        dtype = _E4M3
    return (values * scale).to(dtype).float() / scale


def _product(left: torch.Tensor, right: torch.Tensor, recipe: Float8Recipe, dtype: torch.dtype) -> torch.Tensor:
    """A matrix product of rounded values, of which those on the left have the given format, [rows, columns]."""
    return _rounded(left, recipe, 1, dtype) @ _rounded(right, recipe, 0, _E4M3)


@pytest.mark.parametrize("recipe", _RECIPES)
def test_a_layer_multiplies_rounded_values_and_keeps_its_parameters(recipe: Float8Recipe) -> None:
    generator = torch.Generator().manual_seed(0)
    block = nn.Sequential(
        nn.Linear(64, 96, bias=False), nn.Linear(96, 30), nn.LayerNorm(30), NonDynamicallyQuantizableLinear(32, 32)
    )
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(generator=generator)
    before = dict(block.named_parameters())
    # 30 is no multiple of 16, and a subclass may do more than its product.
    convert_linear_layers(block, recipe, _CPU)
    assert sum(isinstance(layer, Float8Linear) for layer in block) == 1
    after = dict(block.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert len(after) == len(before)
    inputs = torch.randn(32, 64, generator=generator, requires_grad=True)
    products = block[0](inputs)
    weight = before["0.weight"]
    exact = inputs @ weight.T
    upstream = torch.randn(exact.shape, generator=generator)
    found = (products, *torch.autograd.grad(products, (inputs, weight), upstream))
    in_more_bits = (exact, *torch.autograd.grad(exact, (inputs, weight), upstream))
    with torch.no_grad():
        by_hand = (
            _product(inputs, weight.T, recipe, _E4M3),
            _product(upstream, weight, recipe, _E5M2),
            _product(upstream.T, inputs, recipe, _E5M2),
        )
    for value, wanted, other in zip(found, by_hand, in_more_bits, strict=True):
        torch.testing.assert_close(value.detach(), wanted, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(value, other, rtol=1e-2, atol=1e-2)


def _engines_beside_one_process(ranks: Ranks) -> None:
    alone = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=_CPU)
    for recipe in _RECIPES:
        one_process = _losses(alone, "none", recipe)
        in_bf16 = _losses(ranks, "ddp", precision={"compute": "bf16"})
        assert one_process == pytest.approx(in_bf16, rel=1e-2)
        assert max(abs(a / b - 1) for a, b in zip(one_process, in_bf16, strict=True)) > 1e-4
        for strategy, backend in (
            ("ddp", "torch"),
            ("zero1", "torch"),
            ("zero2", "torch"),
            ("zero3", "torch"),
            ("zero1", "bucketed"),
            ("zero2", "bucketed"),
            ("zero3", "bucketed"),
        ):
            assert _losses(ranks, strategy, recipe, backend=backend) == pytest.approx(one_process, rel=1e-6), strategy


def test_every_engine_trains_as_one_process_does() -> None:
    run_on_ranks(_engines_beside_one_process, 2)


@pytest.mark.parametrize("recipe", _RECIPES)
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_activations_change_no_loss(mode: str, recipe: Float8Recipe) -> None:
    losses = _losses(_ALONE, "none", recipe, activation_checkpointing={"mode": mode})
    assert losses == _losses(_ALONE, "none", recipe)


def _compiled(ranks: Ranks) -> None:
    wanted = _losses(ranks, "none")
    assert _losses(ranks, "none", compile={"enabled": True}) == pytest.approx(wanted, rel=3e-3)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_compiled_block_trains_alike() -> None:
    run_on_ranks(_compiled, 1, timeout_s=240)


def test_a_checkpoint_does_not_know_of_it() -> None:
    states = [
        {part.name: part.tensor.shape for part in engine.state(with_optimizer=True)}
        for engine in (tiny_engine(_ALONE, "none", model=_MODEL, precision={"compute": c}) for c in ("fp8", "fp32"))
    ]
    assert states[0] == states[1]


def test_a_model_without_such_layers_is_refused() -> None:
    # GPT-2 of transformers has convolutions in place of linear layers.
    config = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    with pytest.raises(
        UserError, match="no block of GPT2LMHeadModel has a linear layer whose sizes are multiples of 16"
    ):
        tiny_engine(_ALONE, "none", model={"architecture": "gpt2", "config": config}, precision={"compute": "fp8"})


@pytest.mark.parametrize(("recipe", "capability"), [("tensorwise", (8, 0)), ("rowwise", (8, 9))])
def test_an_older_gpu_is_refused(
    recipe: Float8Recipe, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "an older GPU")
    said = (
        f"fp8_recipe={recipe} needs a GPU of compute capability .* but an older GPU has {capability[0]}.{capability[1]}"
    )
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(16, 16)])})
    with pytest.raises(UserError, match=said):
        check_float8(model, recipe, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    check_float8(model, recipe, torch.device("cuda"))


def test_the_log_says_how_many_layers_there_are() -> None:
    config = tiny_config({"strategy": "none"}, model=_MODEL, precision={"compute": "fp8"})
    settings = config.model.model_copy(update={"config": config.model.config | {"intermediate_size": 90}})
    model = build_model_on_meta(build_task("causal-lm"), settings, FACTS)
    facts = model_facts(model, build_model_config(settings, FACTS))
    line = describe_model(config, facts, _ALONE)
    assert "bfloat16, 8 of 14 linear layers of blocks in float8 (tensorwise, emulated, for a CPU has no such" in line
