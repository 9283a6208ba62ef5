"""A run's memory estimate: the model's sizes, optimizer state as optimizers make it, and activations."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from sharding.config import ActivationCheckpointingConfig
from sharding.memory_formula import FrozenBytes
from sharding.parallel_dims import ParallelDims
from sharding.part import whole_part
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import FACTS, random_batch, tiny_config
from tests.sharding.network_cases import TABLE, TEXTS, RowClassification, network_config
from tests.support import run_on_ranks
from trainer.architectures.auto_model import auto_model
from trainer.architectures.config import build_model_config
from trainer.config.optimizer import OptimizerConfig
from trainer.data.facts import SampleFacts
from trainer.model.memory_estimate import (
    BlockWidths,
    activation_bytes,
    block_widths,
    estimate_memory,
    model_sizes,
    moment_bytes,
)
from trainer.model.models import build_model_on_meta, model_facts, transformers_config
from trainer.optimizers.build import optimizer_factory
from trainer.tasks.registry import build_task

WIDTHS = BlockWidths(hidden=10, attention=8, key_value=4, feed_forward=20, is_gated=True)
# Residual stream and norms, queries and attention's result, keys and values, and the feed-forward layer.
PER_BLOCK = 4 * 10 + 2 * 8 + 2 * 4 + 4 * 20


def _model(**model: Any) -> tuple[Any, Any]:
    config = tiny_config({"strategy": "none"}, **({"model": model} if model else {}))
    model_config = build_model_config(config.model, FACTS)
    return build_model_on_meta(build_task("causal-lm"), config.model, FACTS), model_config


def test_sizes_are_counted_on_meta() -> None:
    model, model_config = _model()
    sizes = model_sizes(model)
    block = 4 * 30 * 30 + 3 * 30 * 53 + 2 * 30
    assert sizes.largest_block == block
    assert sizes.num_outside_blocks == 301 * 30 + 30
    assert sizes.num_parameters == 3 * block + 301 * 30 + 30
    assert sizes.largest_parameter == sizes.largest_shared == 301 * 30
    assert sizes.num_embedding == 0
    assert block_widths(model, model_config) == BlockWidths(30, 30, 30, 53, is_gated=True)

    untied, gpt2_config = _model(
        architecture="gpt2", config={"n_embd": 32, "n_layer": 2, "n_head": 2, "tie_word_embeddings": False}
    )
    sizes = model_sizes(untied)
    assert sizes.largest_shared == 0
    assert sizes.num_embedding == sizes.num_trained_embedding == 301 * 32
    assert block_widths(untied, gpt2_config) == BlockWidths(32, 32, 32, 128, is_gated=False)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "adafactor"])
def test_optimizer_state_has_the_bytes_that_are_said(name: Any) -> None:
    config = OptimizerConfig(name=name)
    model = torch.nn.Sequential(torch.nn.Embedding(40, 16), torch.nn.ModuleList([torch.nn.Linear(16, 24)]))
    optimizer = optimizer_factory(config, {"1.0.weight"})([whole_part(*named) for named in model.named_parameters()])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if value is not None]
    assert sum(t.numel() * t.element_size() for t in tensors if t.ndim) == moment_bytes(config, model)


def test_activations_depend_on_what_is_recomputed() -> None:
    def kept(mode: Any, compute_bytes: int = 4, budget: float = 0.5) -> float:
        checkpointing = ActivationCheckpointingConfig(mode=mode, every_n=2, memory_budget=budget)
        return activation_bytes(
            WIDTHS,
            num_blocks=5,
            vocabulary=100,
            num_tokens=7,
            num_logit_tokens=7,
            checkpointing=checkpointing,
            compute_bytes=compute_bytes,
        )

    assert kept("none") == 7 * (4 * 5 * PER_BLOCK + 12 * 100)
    assert kept("none", compute_bytes=2) == 7 * (2 * 5 * PER_BLOCK + 10 * 100)
    # The inputs of all blocks, and one block while it is recomputed.
    assert kept("full") == 7 * (4 * (5 * 10 + PER_BLOCK) + 12 * 100)
    # Blocks 0, 2 and 4 are recomputed.
    assert kept("every_n") == 7 * (4 * (3 * 10 + 2 * PER_BLOCK) + 12 * 100)
    assert kept("full") < kept("selective") < kept("none")
    # Inputs and half of the rest, of all blocks and of that which is recomputed.
    assert kept("budget") == 7 * (4 * (5 * 10 + 3 * (PER_BLOCK - 10)) + 12 * 100)
    assert kept("budget", budget=1.0) == kept("none")
    assert kept("budget", budget=0.0) < kept("full")


def _estimate_holds(ranks: Ranks) -> None:
    """What autograd keeps, and the state, of the tiny model on one rank."""
    from sharding.mesh import build_mesh
    from trainer.model.engine import build_model_engine

    config = tiny_config({"strategy": "none"}, batch={"global_size": 4, "micro_size": 2})
    model, model_config = _model()
    estimate = estimate_memory(config, model, model_config, ParallelDims(), ranks.device)
    assert estimate.state.masters == 4 * model_sizes(model).num_parameters
    assert estimate.state.moments == 2 * estimate.state.masters
    assert estimate.total == estimate.state.total + estimate.activations
    # A teacher is beside the student, or is asked, and gone, before.
    taught = replace(estimate, teacher=FrozenBytes(1e12, 3e12))
    assert taught.total == estimate.state.total + 4e12
    assert replace(taught, is_taught_before=True).total == 4e12
    assert replace(taught, teacher=FrozenBytes(1.0, 2.0), is_taught_before=True).total == estimate.total

    engine, _ = build_model_engine(config, build_task("causal-lm"), build_mesh(config.parallel, ranks), ranks, FACTS)
    own = {shard.untyped_storage().data_ptr() for shard in engine.named_local_shards().values()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.train_batch([random_batch(0)], 32)
    # The least that is kept: transformers' norms keep more.
    assert 0.6 * sum(saved.values()) < estimate.activations < 1.2 * sum(saved.values())


def test_estimate_of_a_run() -> None:
    run_on_ranks(_estimate_holds, 1)


def test_a_classifier_of_texts_has_no_logits_for_each_token() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tiny_config({"strategy": "ddp"}, model={"architecture": "bert", "config": sizes})
    facts = SampleFacts(sequence_length=16, vocab_size=20_000)
    with torch.device("meta"):
        model = auto_model("sequence-classification", config.model, facts, 2)
    estimate = estimate_memory(config, model, model.config, ParallelDims(), torch.device("cpu"), facts)
    # Logits of one row of 16 tokens would take 4 x 16 x 20,000 bytes.
    assert 4 * 16 * 32 < estimate.activations < 16 * 20_000


@pytest.mark.parametrize(
    ("builtin", "arguments", "parameters"),
    [("mlp", {"hidden_sizes": [5], "batch_norm": True}, 6 * 5 + 10 + 5 * 3 + 3), ("lstm", {}, None)],
)
def test_the_memory_of_a_small_network(builtin: str, arguments: dict[str, Any], parameters: int | None) -> None:
    config = network_config(builtin, arguments, {"strategy": "ddp"}, batch={"global_size": 12, "micro_size": 12})
    facts = TABLE if builtin == "mlp" else TEXTS
    model = build_model_on_meta(RowClassification(), config.model, facts)
    assert transformers_config(model, config.model, facts) is None
    found = model_facts(model, None)
    assert parameters is None or found.num_parameters == parameters
    # So that no share of a peak is made up.
    assert not found.is_per_token
    device = torch.device("cpu")
    estimate = estimate_memory(config, model, None, ParallelDims(shard=1), device, facts)
    assert estimate.state.masters == 4 * found.num_parameters
    rows = 12 * (9 if builtin == "lstm" else 1)
    # What every linear layer is given, at least.
    assert estimate.activations > 4 * rows * 5
    doubled = network_config(builtin, arguments, {"strategy": "ddp"}, batch={"global_size": 24, "micro_size": 24})
    twice = estimate_memory(doubled, model, None, ParallelDims(shard=1), device, facts)
    assert 1.8 * estimate.activations < twice.activations < 2.2 * estimate.activations
