"""Architectures of `transformers`: each trains, or is refused in one sentence before it does."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from sharding.blocks import hidden_matrices
from sharding.mesh import build_mesh
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import FACTS, num_targets, random_batch, tiny_config
from tests.trainer.model.architectures import causal_architectures, tiny_model
from trainer.architectures.config import build_model_config
from trainer.architectures.initialization import initialize_module
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts
from trainer.model.engine import build_model_engine
from trainer.model.models import build_model_on_meta, model_facts
from trainer.tasks.registry import build_task

_ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
_SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


def _train_once(model: dict[str, Any]) -> int:
    """One step, whose loss and gradient are numbers and after which the loss on the batch is lower; parameters."""
    config = tiny_config({"strategy": "none"}, model=model)
    mesh = build_mesh(config.parallel, _ALONE)
    engine, facts = build_model_engine(config, build_task("causal-lm"), mesh, _ALONE, FACTS)
    batch = random_batch(1)
    losses = []
    for _ in range(2):
        losses.append(float(engine.train_batch([batch], num_targets([batch], 1))))
        assert math.isfinite(float(engine.clip_grad_norm(1.0)))
        engine.step(1e-2)
    assert losses[1] < losses[0], losses
    assert facts.num_layers >= 1
    return facts.num_parameters


def _outcome(architecture: str) -> str:
    """``trains``, or the sentence; without scaled dot-product attention where it says so."""
    model = tiny_model(architecture)
    try:
        try:
            _train_once(model)
        except UserError as error:
            if not str(error).endswith("; set model.attention=eager."):
                raise
            _train_once(model | {"attention": "eager"})
    except UserError as error:
        said = str(error)
        assert said.endswith(".")
        assert "\n" not in said
        assert len(said) < 400, said
        return said
    return "trains"


# Each needs something that a llama does not: a default left open, an activation with parameters, a buffer that the
# whole model fills, heads that differ between layers, no sdpa, no positions, no attention, a per-layer vocabulary.
_SAMPLE = ["apertus", "falcon_h1", "gemma2", "gemma4_text", "gpt_oss", "hunyuan_v1_dense", "mamba2", "nemotron",
           "openai-gpt", "xlnet"]  # fmt: skip


@pytest.mark.parametrize("architecture", _SAMPLE)
def test_it_trains(architecture: str) -> None:
    assert _outcome(architecture) == "trains"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_causal_architecture_trains_or_is_refused_in_a_sentence() -> None:
    outcomes = {architecture: _outcome(architecture) for architecture in causal_architectures()}
    trained = [architecture for architecture, outcome in outcomes.items() if outcome == "trains"]
    print(f"{len(trained)} of {len(outcomes)} train")
    for architecture, outcome in outcomes.items():
        if outcome != "trains":
            print(f"{architecture}: {outcome}")
    # With transformers 5.23.
    assert len(trained) >= 145


@pytest.mark.parametrize(
    ("architecture", "config", "reason"),
    [
        ("llama", {"hidden_act": "swiglu"}, r"a llama .* cannot be built: KeyError: .*swiglu"),
        ("llama", {"num_key_value_heads": 3}, r"num_key_value_heads=3 does not divide its num_attention_heads=4"),
        # Of sizes that nobody checks, the first forward pass tells.
        ("gptj", {"n_embd": 32, "n_layer": 1, "n_head": 4}, r"cannot compute on sequences of 16 tokens: .* fit tog"),
        ("prophetnet", {"num_hidden_layers": 2}, r"not accepted by prophetnet: NotImplementedError"),
        ("gemma4_assistant", {}, r"cannot be trained from scratch: hidden_size_per_layer_input must be 0, got 256"),
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 2}, r"mamba does not have model\.attention=sdpa; set "),
        ("llama", {"attn_implementation": "eager"}, r"model\.config\.attn_implementation is set by model\.attention"),
        ("llama", {"dtype": "bfloat16"}, r"model\.config\.dtype is set by precision\.compute"),
        ("gpt2", {"rope_theta": 1e5}, r"model\.config\.rope_theta is not a field of gpt2"),
        ("gemma3_text", {"rope_theta": 5e5}, r"=500000\.0 does not reach .* set model\.config\.rope_parameters"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_work_is_refused_in_a_sentence(
    architecture: str, config: dict[str, Any], reason: str
) -> None:
    # Small, so that a machine survives where nothing is refused.
    sizes = _SIZES if architecture in ("llama", "gemma3_text") else {}
    attention = {"attention": "eager"} if architecture == "gptj" else {}
    with pytest.raises(UserError, match=reason) as refused:
        _train_once({"architecture": architecture, "config": sizes | config} | attention)
    assert "\n" not in str(refused.value)


def _build(**model: Any) -> Any:
    settings, facts = ModelConfig(**model), SampleFacts(16, 300, 7)
    return build_model_config(settings, facts), build_model_on_meta(build_task("causal-lm"), settings, facts)


def test_rope_theta_is_accepted_where_it_takes_effect() -> None:
    config, _ = _build(architecture="llama", config=_SIZES | {"rope_theta": 5e5})
    assert config.rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("architecture", "text"), [("gemma3", "gemma3_text"), ("llama4", "llama4_text"), ("qwen3_5", "qwen3_5_text")]
)
def test_a_model_of_more_than_text_points_to_its_language_model(architecture: str, text: str) -> None:
    with pytest.raises(
        UserError, match=rf"set model\.architecture={text}, with the fields of model\.config\.text_config"
    ):
        _build(architecture=architecture)


def test_the_vocabulary_reaches_a_part_that_is_no_architecture_of_its_own() -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "pad_token_id": 0}  # fmt: skip
    config, model = _build(architecture="emu3", config={"text_config": text}, vocab_multiple=64)
    assert config.get_text_config().vocab_size == 320
    assert config.get_text_config().eos_token_id == config.get_text_config().bos_token_id == 7
    assert model.get_input_embeddings().weight.shape == (320, 16)
    with pytest.raises(UserError, match=r"model\.config\.text_config=3 must be a mapping"):
        _build(architecture="emu3", config={"text_config": 3})


def test_the_vocabulary_reaches_a_second_table_of_embeddings() -> None:
    config, model = _build(architecture="gemma4_text", config={"num_hidden_layers": 2, "hidden_size": 16})
    assert config.vocab_size == config.vocab_size_per_layer_input == 300
    assert max(p.shape[0] for n, p in model.named_parameters() if "embed_tokens" in n) == 300


def test_heads_that_differ_between_layers_are_counted() -> None:
    sizes = {"num_hidden_layers": 6, "hidden_size": 16, "num_attention_heads": 4}
    config, model = _build(architecture="gemma4_text", config=sizes)
    widths = [layer.num_attention_heads * layer.head_dim for layer in config.per_layer_config]
    assert len(set(widths)) > 1
    assert model_facts(model, config).attention_width == sum(widths) // 6
    # The whole has none of these fields then, nor an answer for whoever asks it.
    config, _ = _build(architecture="dots3_note_text", config={"num_hidden_layers": 6})
    assert len({layer.num_attention_heads for layer in config.per_layer_config}) > 1


class _Stock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 8), nn.TransformerEncoderLayer(8, 2, 8)])
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)


class _Bare(_Stock):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class _Reset(_Bare):
    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)


class _Buffer(_Stock):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(3.0))


class _Reaching(_Stock):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.blocks[0].linear1.weight)


def _initial(kind: type[nn.Module], seed: int = 3) -> dict[str, torch.Tensor]:
    from sharding.build_engine import build_engine
    from sharding.engine import ModelDefinition
    from trainer.optimizers.build import optimizer_factory

    with torch.device("meta"):
        model = kind()
    config = tiny_config({"strategy": "none"})
    definition = ModelDefinition(model, lambda module: initialize_module(model, module), lambda *_: torch.zeros(()),
                                 lambda *_: torch.zeros(()), seed)  # fmt: skip
    engine = build_engine(
        definition,
        build_mesh(config.parallel, _ALONE),
        _ALONE.device,
        optimizer_factory(config.optimizer, hidden_matrices(model)),
        parallel=config.parallel,
        precision=config.precision,
        activation_checkpointing=config.activation_checkpointing,
        compilation=config.compile,
        deepspeed_settings={},
    )
    return engine.named_local_shards()


class _Table(nn.Module):
    """A buffer of whole numbers or truth values, which its constructor fills."""

    def __init__(self, dtype: torch.dtype, *, fills: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("table", torch.ones(4, dtype=dtype))
        self._fills = fills

    def reset_parameters(self) -> None:
        if self._fills:
            self.table.fill_(True if self.table.dtype is torch.bool else torch.iinfo(self.table.dtype).max)


def test_stock_modules_of_torch_are_initialised_by_name_and_seed() -> None:
    torch.manual_seed(0)
    first = _initial(_Stock)
    torch.manual_seed(1)
    again = _initial(_Stock)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = _initial(_Stock, seed=4)["attention.in_proj_weight"]
    assert not torch.equal(first["attention.in_proj_weight"], other)
    # As torch does it: Glorot's, within sqrt(6 / (8 + 24)).
    bound = math.sqrt(6 / 32)
    assert 0.5 * bound < float(first["blocks.0.self_attn.in_proj_weight"].abs().max()) <= bound
    assert float(first["attention.in_proj_bias"].abs().max()) == 0.0


def test_what_nothing_initialises_is_named_with_the_remedy() -> None:
    with pytest.raises(
        UserError, match=r"left scale, of tests\.\S+_Bare, without values: give _Bare a method reset_par"
    ):
        _initial(_Bare)
    with pytest.raises(
        UserError, match=r"left table, of tests\.\S+_Buffer, without values: give _Buffer a method reset"
    ):
        _initial(_Buffer)
    for dtype in (torch.int64, torch.int8, torch.bool):
        with pytest.raises(UserError, match=r"left table, of tests\.\S+_Table, without values: give _Table a method"):
            _initial(lambda dtype=dtype: _Table(dtype, fills=False))
        # Also where what it is given is what memory is filled with until then.
        _initial(lambda dtype=dtype: _Table(dtype, fills=True))
    with pytest.raises(UserError, match=r"_Reaching initialises parameters of blocks inside it"):
        _initial(_Reaching)
    assert torch.equal(_initial(_Reset)["scale"], torch.ones(3))
