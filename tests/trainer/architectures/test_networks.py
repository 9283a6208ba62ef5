"""The built-in networks: what they read, that padding says nothing, and what is refused; models of one's own."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from sharding.ranks.errors import UserError
from tests.support import write_config
from trainer.architectures.networks import build_network
from trainer.config import load_config, parse_config
from trainer.config.networks import NETWORKS
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts

TABLE = SampleFacts(num_features=5)
RATINGS = SampleFacts(num_features=2, categories=(("user", 7), ("item", 9)))
IMAGES = SampleFacts(image_shape=(1, 8, 6))
RECORDINGS = SampleFacts(num_audio_samples=64, sampling_rate=800)
TEXTS = SampleFacts(sequence_length=12, vocab_size=50)

_DENSE = {"batch_norm": True, "activation": "prelu", "dropout": 0.1}
_CASES: list[tuple[str, dict[str, Any], SampleFacts, dict[str, torch.Tensor]]] = [
    ("mlp", {"hidden_sizes": [7, 6], **_DENSE}, TABLE, {"features": torch.randn(4, 5)}),
    ("mlp", {"hidden_sizes": []}, TABLE, {"features": torch.randn(4, 5)}),
    ("mlp", {"activation": "gelu"}, IMAGES, {"pixel_values": torch.randn(4, 1, 8, 6)}),
    ("mlp", {"activation": "leaky-relu"}, RECORDINGS, {"input_values": torch.randn(4, 64)}),
    ("cnn", {"channels": [4, 5], **_DENSE}, IMAGES, {"pixel_values": torch.randn(4, 1, 8, 6)}),
    (
        "cnn",
        {"channels": [4, 5], "kernel_size": 5, "pool_size": 4, "hidden_sizes": [6]},
        RECORDINGS,
        {"input_values": torch.randn(4, 64)},
    ),
    (
        "lstm",
        {"num_layers": 2, "hidden_size": 5, "embedding_size": 6},
        TEXTS,
        {"input_ids": torch.randint(50, (4, 12)), "attention_mask": torch.ones(4, 12, dtype=torch.long)},
    ),
    (
        "lstm",
        {"bidirectional": False, "mean_embedding": False, "dropout": 0.1},
        TEXTS,
        {"input_ids": torch.randint(50, (4, 12)), "attention_mask": torch.ones(4, 12, dtype=torch.long)},
    ),
    (
        "embedding-mlp",
        {"hidden_sizes": [8], "embedding_size": 3},
        RATINGS,
        {"categories": torch.randint(7, (4, 2)), "features": torch.randn(4, 2)},
    ),
    (
        "embedding-mlp",
        {},
        SampleFacts(categories=RATINGS.categories),
        {"categories": torch.randint(7, (4, 2))},
    ),
]


@pytest.mark.parametrize(("builtin", "arguments", "facts", "columns"), _CASES)
def test_each_network_predicts_and_every_parameter_has_a_gradient(
    builtin: Any, arguments: dict[str, Any], facts: SampleFacts, columns: dict[str, torch.Tensor]
) -> None:
    network = build_network(ModelConfig(builtin=builtin, arguments=arguments), facts, 3)
    logits = network(**columns)
    assert logits.shape == (4, 3)
    logits.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    # What the configuration says is there.
    assert any(isinstance(m, nn.PReLU) for m in network.modules()) == (arguments.get("activation") == "prelu")
    assert any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()) == bool(
        arguments.get("batch_norm")
    )
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} <= {arguments.get("dropout", 0.0)}


def test_every_network_is_tried() -> None:
    assert {case[0] for case in _CASES} == set(NETWORKS)
    assert tuple(NETWORKS) == get_args(get_args(ModelConfig.model_fields["builtin"].annotation)[0])


def test_what_an_lstm_finds_does_not_depend_on_the_padding_of_its_batch() -> None:
    torch.manual_seed(0)
    network = build_network(ModelConfig(builtin="lstm", arguments={"num_layers": 2}), TEXTS, 3).eval()
    ids = torch.randint(50, (1, 7))
    alone = network(input_ids=ids, attention_mask=torch.ones(1, 7, dtype=torch.long))
    padded = torch.cat([torch.cat([ids, torch.full((1, 5), 3)], dim=1), torch.randint(50, (1, 12))])
    mask = torch.tensor([[1] * 7 + [0] * 5, [1] * 12])
    assert torch.allclose(network(input_ids=padded, attention_mask=mask)[:1], alone, atol=1e-6)
    # The same tokens in another order are another text, from both ends.
    assert not torch.allclose(
        network(input_ids=ids.flip(1), attention_mask=torch.ones(1, 7, dtype=torch.long)), alone, atol=1e-4
    )
    # A text of no token has numbers, too.
    assert network(input_ids=ids, attention_mask=torch.zeros(1, 7, dtype=torch.long)).isfinite().all()


def test_both_directions_are_what_torch_computes_for_one_text() -> None:
    torch.manual_seed(0)
    network: Any = build_network(ModelConfig(builtin="lstm", arguments={"hidden_size": 4}), TEXTS, 3)
    reference = nn.LSTM(64, 4, batch_first=True, bidirectional=True)
    layer = network.layers[0]
    for name, parameter in layer.onwards.named_parameters():
        getattr(reference, name).data = parameter.data
        getattr(reference, f"{name}_reverse").data = getattr(layer.backwards, name).data
    embedded = torch.randn(1, 9, 64)
    reversed_positions = torch.arange(8, -1, -1)[None]
    assert torch.allclose(layer(embedded, reversed_positions), reference(embedded)[0], atol=1e-6)


def test_a_value_that_training_has_not_seen_says_nothing() -> None:
    network: Any = build_network(ModelConfig(builtin="embedding-mlp"), RATINGS, 1)
    assert network.embeddings[0].weight[0].abs().max() == 0
    assert network.embeddings[0].weight[1:].abs().min() > 0


@pytest.mark.parametrize(
    ("builtin", "arguments", "facts", "sentence"),
    [
        ("mlp", {}, TEXTS, "builtin=mlp does not read texts; choose another, model.builtin=lstm say"),
        ("mlp", {}, RATINGS, "does not read the categorical column user; .* model.builtin=embedding-mlp"),
        ("embedding-mlp", {}, TABLE, "does not read samples without categorical columns"),
        ("cnn", {}, TABLE, "does not read samples that are neither images nor recordings"),
        ("lstm", {}, IMAGES, "does not read samples that are no texts"),
        (
            "cnn",
            {"channels": [2, 2, 2]},
            IMAGES,
            r"channels=\[2, 2, 2\] with pool_size=2 divides samples of 8 x 6",
        ),
    ],
)
def test_samples_that_a_network_does_not_read_are_refused(
    builtin: Any, arguments: dict[str, Any], facts: SampleFacts, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        build_network(ModelConfig(builtin=builtin, arguments=arguments), facts, 3)


def test_a_built_in_network_needs_a_number_of_predictions() -> None:
    with pytest.raises(UserError, match="builtin=mlp needs a number of predictions"):
        build_network(ModelConfig(builtin="mlp"), TABLE, None)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            {"builtin": "mlp", "architecture": "llama"},
            "model.architecture=llama and model.builtin=mlp: set exactly",
        ),
        ({}, "the model is not named: set exactly one of model.architecture, model.pretrained, model.builtin and"),
        (
            {"builtin": "mlp", "config": {"a": 1}},
            "goes without model.builtin only, but it is mlp: it is a setting of transf",
        ),
        (
            {"builtin": "mlp", "attention": "eager"},
            "model.attention=eager goes without model.builtin only, but it is mlp",
        ),
        (
            {"builtin": "mlp", "vocab_multiple": 64},
            "model.vocab_multiple=64 goes without model.builtin only, but it is",
        ),
        (
            {"architecture": "llama", "arguments": {"a": 1}},
            "model.arguments.a=1 goes without model.architecture only, but",
        ),
        ({"builtin": "mlp", "folder": "here"}, "model.folder=here goes with model.factory only, which is not set"),
        (
            {"builtin": "mlp", "arguments": {"hidden_size": [2]}},
            r"arguments.hidden_size is no .*; did you mean hid",
        ),
        ({"builtin": "mlp", "arguments": {"dropout": 1.5}}, r"model.arguments.dropout=1.5: input should be less than"),
        ({"builtin": "mlp", "arguments": {"hidden_sizes": [2, 0]}}, "a layer has at least 1 element"),
        ({"builtin": "mlp", "arguments": {"activation": "tanh"}}, "model.arguments.activation='tanh': input should"),
        (
            {"builtin": "cnn", "arguments": {"kernel_size": 4}},
            "kernel_size=4 has no middle; write an odd number, 5",
        ),
        (
            {"builtin": "cnn", "arguments": {"channels": []}},
            r"model.arguments.channels=\[\]: list should have at",
        ),
        ({"builtin": "gru"}, "model.builtin='gru'"),
        ({"factory": "module"}, "model.factory=module is not module:function"),
        ({"factory": ":make"}, "model.factory=:make is not module:function"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(model: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_config({"steps": 1, "model": model, "task": {"name": "module:Task"}}, "test")


def test_a_network_that_predicts_one_thing_is_no_language_model() -> None:
    with pytest.raises(UserError, match=r"builtin=lstm predicts one thing of each sample, but task.name=causal-lm one"):
        parse_config({"steps": 1, "model": {"builtin": "lstm"}}, "test")


_OWN = """
from torch import nn

def make(*, facts, num_outputs, width):
    return nn.Linear(facts.num_features * width, num_outputs)

def strict(facts):
    return nn.Linear(1, 1)

def wrong(**arguments):
    return "a model"
"""


def test_a_factory_lies_beside_the_configuration_and_is_called_with_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "own_networks.py").write_text(_OWN)
    model = {"factory": "own_networks:make", "arguments": {"width": 3}}
    path = write_config(tmp_path / "run.yaml", {"steps": 1, "model": model, "task": {"name": "module:Task"}})
    settings = load_config(path).model
    assert settings.folder == str(tmp_path)
    with torch.device("meta"):
        made: Any = build_network(settings, TABLE, 4)
    assert (made.in_features, made.out_features, made.weight.is_meta) == (15, 4, True)

    def refused(factory: str, sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            build_network(settings.model_copy(update={"factory": factory}), TABLE, 4)

    refused("own_networks:missing", "model.factory=own_networks:missing cannot be imported: .* has no 'missing'")
    refused("no_such_networks:make", r"cannot be imported: No module .* \(model.folder=.*; else it must be installed")
    refused("own_networks:strict", r"cannot be called with facts, num_outputs, width .*; write def strict\(\*, facts,")
    refused("own_networks:wrong", "made str, which is no torch.nn.Module")
