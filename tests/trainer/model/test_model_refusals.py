"""Settings of a model's configuration that would be ignored, and padding tokens of foreign tokenizers."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import MixtralConfig

from sharding.ranks.errors import UserError
from tests.sharding.engine_cases import tiny_config
from trainer.architectures.config import build_model_config
from trainer.data.facts import SampleFacts
from trainer.model.models import build_model_on_meta
from trainer.model.refusals import refuse_auxiliary_losses, refuse_layer_drop, refuse_positions_by_padding
from trainer.tasks.causal_lm import CausalLanguageModelling, predicts_next_tokens
from trainer.tasks.registry import build_task
from trainer.tasks.task import Outputs

_FACTS = SampleFacts(16, 100, 0)
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def _model(architecture: str, **config: Any) -> dict[str, Any]:
    return {"model": {"architecture": architecture, "config": config}}


@pytest.mark.parametrize("architecture", ["olmo2", "phi3", "smollm3", "llama"])
def test_no_word_is_taken_for_padding(architecture: str) -> None:
    config = tiny_config({"strategy": "none"}, **_model(architecture, **_SIZES))
    model_config = build_model_config(config.model, _FACTS)
    assert model_config.pad_token_id is None
    model = build_model_on_meta(build_task("causal-lm"), config.model, _FACTS)
    assert [m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding)] == [None]


def test_a_padding_token_of_the_users_own_is_one_of_the_vocabulary() -> None:
    config = tiny_config({"strategy": "none"}, **_model("olmo2", **_SIZES, pad_token_id=99))
    assert build_model_config(config.model, _FACTS).pad_token_id == 99
    config = tiny_config({"strategy": "none"}, **_model("olmo2", **_SIZES, pad_token_id=100))
    with pytest.raises(UserError, match=r"pad_token_id=100, which is none of its vocab_size=100"):
        build_model_config(config.model, _FACTS)


def test_positions_that_are_counted_from_padding_need_it() -> None:
    sizes = {key: value for key, value in _SIZES.items() if "key_value" not in key} | {"is_decoder": True}
    for padding in (None, 1):
        config = tiny_config({"strategy": "none"}, **_model("roberta", **sizes, pad_token_id=padding))
        model_config = build_model_config(config.model, _FACTS)
        model = build_model_on_meta(build_task("causal-lm"), config.model, _FACTS)
        if padding is None:
            with pytest.raises(UserError, match="roberta cannot be without a padding token, but pad_token_id=null"):
                refuse_positions_by_padding(config, model, model_config)
        else:
            refuse_positions_by_padding(config, model, model_config)


def test_a_class_that_must_have_padding_says_so() -> None:
    config = tiny_config({"strategy": "none"}, **_model("modernbert-decoder", hidden_size=32))
    with pytest.raises(UserError, match="modernbert-decoder cannot be without a padding token, but pad_token_id=null"):
        build_model_config(config.model, _FACTS)


@pytest.mark.parametrize(
    ("architecture", "settings", "found"),
    [
        ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.5},
         "model.config.output_router_logits=true with model.config.router_aux_loss_coef=0.5 asks transformers"),
        ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.0}, None),
        ("mixtral", {"output_router_logits": False, "router_aux_loss_coef": 0.5}, None),
        ("qwen3_moe", {"output_router_logits": True}, "router_aux_loss_coef=0.001"),
        ("jetmoe", {"output_router_logits": True}, "aux_loss_coef=0.01"),
        ("dbrx", {"output_router_logits": True}, "model.config.output_router_logits=true asks"),
        # The coefficient, which is not 0, lies in a part, and the switch, which is off, in the whole.
        ("dbrx", {}, None),
        ("bamba", {"z_loss_coefficient": 1e-4}, "model.config.z_loss_coefficient=0.0001 .*or set task.z_loss"),
        ("bamba", {}, None),
    ],
)  # fmt: skip
def test_a_loss_of_transformers_own_is_refused(architecture: str, settings: dict[str, Any], found: str | None) -> None:
    config = tiny_config({"strategy": "none"}, **_model(architecture, **settings))
    model_config = build_model_config(config.model, _FACTS)
    if found is None:
        refuse_auxiliary_losses(config, model_config)
        return
    with pytest.raises(UserError, match=found):
        refuse_auxiliary_losses(config, model_config)


def test_a_loss_in_a_pretrained_configuration_is_refused_by_its_file(tmp_path: Path) -> None:
    MixtralConfig(output_router_logits=True, router_aux_loss_coef=0.02, vocab_size=100).save_pretrained(tmp_path)
    config = tiny_config({"strategy": "none"}, model={"pretrained": str(tmp_path)})
    with pytest.raises(UserError, match=r"config\.json has output_router_logits=true and router_aux_loss_coef=0\.02"):
        refuse_auxiliary_losses(config, build_model_config(config.model, _FACTS))


def test_losses_that_are_the_tasks_own_may_be_anything() -> None:
    class OwnModel(CausalLanguageModelling):
        def build_model(self, model_settings: Any, facts: Any) -> nn.Module:
            return nn.Linear(1, 1)

    class OwnLoss(OwnModel):
        def loss(self, outputs: Outputs, batch: Any) -> Any:
            return super().loss(outputs, batch)

    assert predicts_next_tokens(build_task("causal-lm"))
    assert predicts_next_tokens(OwnModel())
    assert not predicts_next_tokens(OwnLoss())


@pytest.mark.parametrize(
    ("architecture", "name"), [("opt", "layerdrop"), ("bart", "decoder_layerdrop"), ("biogpt", "layerdrop")]
)
def test_layers_that_each_rank_drops_by_itself_are_refused_where_ranks_gather_them_together(
    architecture: str, name: str
) -> None:
    legal = ({"strategy": "ddp"}, {"strategy": "zero3", "backend": "bucketed"})
    refused = ({"strategy": "zero1"}, {"strategy": "zero3"}, {"strategy": "zero2", "backend": "deepspeed"})
    for parallel in (*legal, *refused):
        config = tiny_config(parallel, **_model(architecture, **{name: 0.1}))
        model_config = build_model_config(config.model, _FACTS)
        refuse_layer_drop(config, model_config, 1)
        if parallel in legal:
            refuse_layer_drop(config, model_config, 2)
            continue
        expected = f"^model.config.{name}=0.1 lets .*={parallel['strategy']} .* set it to 0"
        with pytest.raises(UserError, match=expected):
            refuse_layer_drop(config, model_config, 2)
