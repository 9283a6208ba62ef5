"""Products in 8 bits: one layer by hand, every engine beside one process, and who is refused."""

from typing import Any

import pytest
import torch
from torch import nn

from sharding.config import Float8Recipe
from sharding.errors import UserError
from sharding.float8 import check_float8, convert_linear_layers
from sharding.process_group import Ranks
from tests.sharding.engine_cases import tiny_engine, train_steps
from tests.support import run_on_ranks

_CPU = torch.device("cpu")
_ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=_CPU)
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
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


def _losses(ranks: Ranks, strategy: str, compute: str = "fp8", **settings: Any) -> list[float]:
    return train_steps(tiny_engine(ranks, strategy, model=_MODEL, precision={"compute": compute}, **settings), ranks)


def _rounded(values: torch.Tensor, recipe: Float8Recipe) -> torch.Tensor:
    """Values as 8 bits hold them, scaled so that the largest, of all or of a row, is the largest there is.

    Scales of rows are powers of two, by which nothing is rounded.
    """
    largest = values.abs().amax(dim=-1, keepdim=True) if recipe == "rowwise" else values.abs().max()
    scale = _LARGEST / largest
    if recipe == "rowwise":
        scale = 2 ** scale.log2().floor()
    return (values * scale).to(torch.float8_e4m3fn).float() / scale


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_layer_multiplies_rounded_values_and_keeps_its_parameters(recipe: Float8Recipe) -> None:
    generator = torch.Generator().manual_seed(0)
    block = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 30), nn.LayerNorm(30))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(generator=generator)
    before = dict(block.named_parameters())
    # 30 is no multiple of 16.
    assert convert_linear_layers(block, recipe, _CPU) == 1
    after = dict(block.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert len(after) == len(before)
    inputs = torch.randn(32, 64, generator=generator, requires_grad=True)
    products = block[0](inputs)
    weight = before["0.weight"]
    exact = inputs @ weight.T
    by_hand = _rounded(inputs.detach(), recipe) @ _rounded(weight.detach(), recipe).T
    torch.testing.assert_close(products.detach(), by_hand, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(products, exact, rtol=1e-3)
    upstream = torch.randn(exact.shape, generator=generator)
    found = torch.autograd.grad(products, (inputs, weight), upstream)
    wanted = torch.autograd.grad(exact, (inputs, weight), upstream)
    for gradient, exact_gradient in zip(found, wanted, strict=True):
        # Mantissas of 3 bits, and of 2 in gradients: at most 1/16 and 1/8 off, each by chance.
        assert float((gradient - exact_gradient).norm() / exact_gradient.norm()) < 0.1


def _engines_beside_one_process(ranks: Ranks) -> None:
    alone = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=_CPU)
    one_process, in_bf16 = _losses(alone, "none"), _losses(alone, "none", "bf16")
    assert one_process == pytest.approx(in_bf16, rel=1e-2)
    assert max(abs(a / b - 1) for a, b in zip(one_process, in_bf16, strict=True)) > 1e-5
    gathered = _losses(ranks, "zero1")
    # A weight that is gathered in 16 bits is rounded twice, and a value at the border goes the other way.
    assert gathered[0] == pytest.approx(one_process[0], rel=1e-3)
    assert gathered == pytest.approx(one_process, rel=1e-2)
    for strategy, engine, wanted in (
        ("ddp", "fully_shard", one_process),
        ("zero2", "bucketed", one_process),
        ("zero2", "fully_shard", gathered),
        ("zero3", "fully_shard", gathered),
        ("zero3", "bucketed", gathered),
    ):
        assert _losses(ranks, strategy, engine=engine) == pytest.approx(wanted, rel=1e-6), (strategy, engine)


def test_every_engine_trains_as_one_process_does() -> None:
    run_on_ranks(_engines_beside_one_process, 2)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_activations_change_no_loss(mode: str) -> None:
    assert _losses(_ALONE, "none", activation_checkpointing={"mode": mode}) == _losses(_ALONE, "none")


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
    with pytest.raises(UserError, match=said):
        check_float8(recipe, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    check_float8(recipe, torch.device("cuda"))
