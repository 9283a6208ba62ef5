"""Documents kept apart: training on packed rows is training on each document alone, or the model is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharding.mesh import build_mesh
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.support import shardline, tiny_values, trained, write_config, write_corpus
from trainer.config import RunConfig, parse_config
from trainer.config.rules import validate
from trainer.data.facts import SampleFacts
from trainer.data.packed import PackedSamples, packed_rows
from trainer.data.prepare import prepare_corpus
from trainer.data.prepared import PreparedCorpus
from trainer.model.document_mask import check_architecture, check_engine
from trainer.model.engine import build_model_engine
from trainer.tasks.causal_lm import CausalLanguageModelling
from trainer.tasks.next_tokens import next_token_batch

TASK = CausalLanguageModelling()
LENGTH = 24
FACTS = SampleFacts(LENGTH, 101, 0)

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 30, "intermediate_size": 53, "num_attention_heads": 3, "num_key_value_heads": 3},
    "gpt2": {"n_embd": 30, "n_layer": 2, "n_head": 3, "n_positions": 64, "resid_pdrop": 0.0},
    "qwen3": {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2},
    # A window of 5: documents are longer, so that both masks count.
    "mistral": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 5,
    },
    "gpt_neox": {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4},
    "mixtral": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    },
    "opt": {"hidden_size": 24, "ffn_dim": 40, "num_attention_heads": 4, "word_embed_proj_dim": 24},
    "xglm": {"d_model": 24, "ffn_dim": 40, "attention_heads": 4, "num_layers": 2},
    "bloom": {"hidden_size": 24, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 24, "state_size": 4, "num_hidden_layers": 2},
    "jamba": {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2},
}


def _config(architecture: str, attention: str = "sdpa", **data: Any) -> RunConfig:
    fields = dict(MODELS[architecture])
    if "hidden_size" in fields and "n_layer" not in fields:
        fields.setdefault("num_hidden_layers", 2)
    if architecture == "gpt2":
        fields |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0}
    values = {
        "steps": 1,
        "model": {"architecture": architecture, "config": fields, "attention": attention},
        "data": {"sequence_length": LENGTH, "document_mask": True} | data,
        "batch": {"global_size": 3, "micro_size": 3},
        "parallel": {"strategy": "none"},
        "precision": {"compute": "fp32"},
    }
    return parse_config(values, "test")


def _model(architecture: str, attention: str) -> torch.nn.Module:
    config = _config(architecture, attention)
    torch.manual_seed(0)
    return TASK.build_model(config.model, FACTS)


def _documents() -> list[list[list[int]]]:
    """Rows of documents, 25 tokens a row, each document but a cut one ended by token 0; one has a single token."""
    generator = np.random.default_rng(3)
    lengths = [[7, 1, 11, 6], [25], [2, 22, 1]]
    return [[[*generator.integers(1, 101, size=n - 1).tolist(), 0] for n in row] for row in lengths]


def _loss_and_gradients(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> tuple[float, int, Any]:
    model.zero_grad()
    total, num_targets = 0.0, 0
    for batch in batches:
        loss = TASK.loss(TASK.forward(model, batch), batch)
        loss.backward()
        total += loss.item()
        num_targets += TASK.num_targets(batch)
    return total, num_targets, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("gpt2", "sdpa"),
        ("gpt2", "eager"),
        ("qwen3", "sdpa"),
        ("mistral", "sdpa"),
        ("gpt_neox", "sdpa"),
        ("mixtral", "sdpa"),
    ],
)
def test_packed_training_is_unpacked_training(architecture: str, attention: str) -> None:
    model = _model(architecture, attention)
    rows = _documents()
    tokens = np.array([[token for document in row for token in document] for row in rows])
    is_start = np.zeros(tokens.shape, dtype=bool)
    for number, row in enumerate(rows):
        is_start[number, np.cumsum([0, *(len(document) for document in row)])[:-1]] = True
    packed = _loss_and_gradients(model, [next_token_batch(packed_rows(tokens, is_start=is_start))])
    # A document of one token has nothing to predict, and cut off the last token of a row is a target only.
    alone = [
        next_token_batch(packed_rows(np.array([document]))) for row in rows for document in row if len(document) > 1
    ]
    unpacked = _loss_and_gradients(model, alone)
    assert packed[1] == unpacked[1] == 6 + 0 + 10 + 5 + 24 + 1 + 21 + 0
    assert packed[0] == pytest.approx(unpacked[0], rel=1e-6)
    assert packed[2].keys() == unpacked[2].keys()
    for name, gradient in unpacked[2].items():
        torch.testing.assert_close(packed[2][name], gradient, rtol=1e-4, atol=2e-6, msg=name)
    # Without the mask it is another training, so the comparison can fail.
    plain = _loss_and_gradients(model, [next_token_batch(packed_rows(tokens))])
    assert plain[1] == 72
    assert abs(plain[0] / plain[1] - unpacked[0] / unpacked[1]) > 1e-4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    root = tmp_path_factory.mktemp("documents")
    for number in range(40):
        (root / f"{number:02d}.txt").write_text(f"document {number} " * (1 + number % 7))
    config = _config("llama", source="text", paths=[str(root / "*.txt")], vocab_size=280, cache_dir=str(root / "cache"))
    prepared = prepare_corpus(config.data, progress=False)
    assert isinstance(prepared, PreparedCorpus)
    return prepared


def test_the_loader_knows_where_documents_start(corpus: PreparedCorpus) -> None:
    stream = corpus.stream("train")
    tokens = stream.read(0, stream.num_tokens)
    masked = PackedSamples(corpus.stream, SampleFacts(LENGTH), document_mask=True)
    unmasked = PackedSamples(corpus.stream, SampleFacts(LENGTH))
    number_of_ends = 0
    num_targets = 0
    for index in range(stream.num_samples(LENGTH)):
        batch, plain = (next_token_batch(samples.read("train", [index])) for samples in (masked, unmasked))
        assert torch.equal(batch["input_ids"], plain["input_ids"])
        start = index * LENGTH
        position = 0
        for column in range(min(LENGTH, stream.num_tokens - start)):
            after_an_end = start + column > 0 and tokens[start + column - 1] == corpus.eos_token_id
            position = 0 if column == 0 or after_an_end else position + 1
            assert batch["position_ids"][0, column] == position
            ends = tokens[start + column] == corpus.eos_token_id
            number_of_ends += ends
            assert batch["labels"][0, column] == (-100 if ends else plain["labels"][0, column])
        num_targets += TASK.num_targets(batch)
    num_documents = corpus.manifest.splits["train"].num_documents
    assert number_of_ends == num_documents > 20
    # Every token is a target once, but for the first of each document.
    assert num_targets == stream.num_tokens - num_documents


def _refusal(architecture: str, attention: str = "sdpa") -> str | None:
    """What ``check_architecture`` or ``check_engine`` says, if anything."""
    config = _config(architecture, attention)
    validate(config)
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    try:
        check_architecture(config, TASK, FACTS)
        engine, _ = build_model_engine(config, TASK, build_mesh(config.parallel, ranks), ranks, FACTS)
        check_engine(engine, config, TASK, FACTS)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mistral", "gpt_neox", "mixtral"])
def test_models_that_keep_documents_apart_are_accepted(architecture: str) -> None:
    assert _refusal(architecture) is None


@pytest.mark.parametrize(
    ("architecture", "attention", "reason"),
    [
        ("opt", "sdpa", "attends across documents"),
        ("xglm", "eager", "attends across documents"),
        ("bloom", "eager", "takes no position_ids"),
        ("mamba", "eager", "is recurrent"),
        ("jamba", "eager", "is recurrent"),
    ],
)
def test_models_that_cannot_are_refused_by_name(architecture: str, attention: str, reason: str) -> None:
    sentence = _refusal(architecture, attention)
    assert sentence is not None
    assert f"data.document_mask=true does not work with {architecture} under model.attention={attention}" in sentence
    assert reason in sentence


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_with_documents_kept_apart(tmp_path: Path) -> None:
    values = tiny_values(tmp_path / "runs", tmp_path / "cache", write_corpus(tmp_path / "documents"))
    values["data"]["document_mask"] = True
    values |= {"steps": 3, "activation_checkpointing": {"mode": "full"}, "parallel": {"strategy": "zero3"}}
    config = write_config(tmp_path / "run.yaml", values)
    trained(shardline("run", config, "--nproc-per-node", 2))
    refused = shardline("run", config, "name=opt", "model.architecture=opt", "model.config={}", "--nproc-per-node", 2)
    assert refused.returncode == 2
    assert "data.document_mask=true does not work with opt" in refused.stderr
