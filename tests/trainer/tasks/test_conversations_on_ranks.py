"""Conversations that are packed train as each alone would, on one rank and on two."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharding.mesh import build_mesh
from sharding.ranks.object_exchange import gather_rows, sum_over_ranks
from sharding.ranks.process_group import Ranks
from tests.support import TINY_MODEL, run_on_ranks
from tests.trainer.data.chat_support import CHATML, chat_tokenizer, turns
from trainer.config import RunConfig, parse_config
from trainer.data.chat_template import ChatTemplate
from trainer.data.facts import SampleFacts
from trainer.data.packed import packed_rows, packed_samples
from trainer.data.prepare import prepare_corpus
from trainer.model.engine import build_model_engine
from trainer.tasks.named_sums import NamedSums
from trainer.tasks.registry import configured_task

_LENGTH, _ROWS = 128, 8
_LAYOUTS: list[tuple[int, str, str, dict[str, Any]]] = [
    (1, "none", "torch", {}),
    (1, "none", "torch", {"loss_chunk_tokens": 16, "z_loss": 1e-4}),
    (2, "ddp", "torch", {}),
    (2, "zero3", "torch", {"loss_chunk_tokens": 16}),
]


def _conversations() -> list[dict[str, Any]]:
    generator = np.random.default_rng(1)

    def words() -> str:
        return " ".join("ab"[: generator.integers(1, 3)] for _ in range(generator.integers(1, 4)))

    # Equal ones would be one.
    return [turns(*(f"{i} {words()}" for _ in range(2 * generator.integers(1, 3)))) for i in range(24)]


def _config(root: Path, strategy: str = "none", backend: str = "torch", **task: Any) -> RunConfig:
    data = {
        "source": "jsonl",
        "format": "messages",
        "paths": [str(root / "a.jsonl")],
        "tokenizer": str(root / "tokenizer"),
        "sequence_length": _LENGTH,
        "validation_fraction": 0.0,
        "cache_dir": str(root / "cache"),
    }
    values = {
        "steps": 2,
        "seed": 5,
        "task": task,
        "model": {
            "architecture": "llama",
            "config": TINY_MODEL["config"] | {"max_position_embeddings": _LENGTH},
            "attention": "sdpa",
        },
        "data": data,
        "batch": {"global_size": _ROWS, "micro_size": 1},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "parallel": {"strategy": strategy, "backend": backend},
    }
    return parse_config(values, "test")


def _train(config: RunConfig, ranks: Ranks, facts: SampleFacts, samples: list[Any]) -> tuple[float, list[float]]:
    """Loss of the initial weights over all targets, in evaluation, and of each step; micro-batches in turn on ranks."""
    task = configured_task(config.task, facts)
    mesh = build_mesh(config.parallel, ranks)
    named = NamedSums(task)
    engine, _ = build_model_engine(config, task, mesh, ranks, facts, evaluate=named)
    batches = [
        task.make_batch(one, torch.arange(len(one["tokens"])), training=True)
        for one in samples[mesh.data.rank :: mesh.data.degree]
    ]
    (num_targets,) = sum_over_ranks(torch.tensor([sum(map(task.num_targets, batches))]), ranks)
    sums = named.by_name(gather_rows(named.total(engine.evaluate(batches)).double().cpu(), ranks))
    assert int(sums["targets"]) == num_targets
    losses = []
    for _ in range(config.steps or 0):
        (step_sum,) = sum_over_ranks(engine.train_batch(batches, int(num_targets)).double()[None].cpu(), ranks)
        losses.append(float(step_sum) / num_targets)
        engine.clip_grad_norm(1.0)
        engine.step(0.1)
    return float(sums["loss"]) / num_targets, losses


def _on_ranks(ranks: Ranks, root: Path, layouts: list[tuple[int, str, str, dict[str, Any]]]) -> None:
    config = _config(root)
    corpus = prepare_corpus(config.data, progress=False)
    packed = packed_samples(corpus, config.data)
    num_rows = packed.num_samples("train")
    assert num_rows == _ROWS
    rows = [packed.read("train", [row]) for row in range(num_rows)]
    found = root / "found.json"
    expected: dict[str, list[float]] = json.loads(found.read_text()) if found.exists() else {}
    if not expected:
        template = ChatTemplate(chat_tokenizer(CHATML), "the template")
        alone = [
            packed_rows(ids[None], is_target=is_target[None])
            for conversation in _conversations()
            for ids, is_target in template.encode(template.render(conversation, "here"))
        ]
        for z_loss in (0.0, 1e-4):
            loss, losses = _train(_config(root, z_loss=z_loss), ranks, packed.facts, alone)
            assert losses[-1] < losses[0]
            expected[str(z_loss)] = [loss, *losses]
        found.write_text(json.dumps(expected))
    for _, strategy, backend, task in layouts:
        loss, losses = _train(_config(root, strategy, backend, **task), ranks, packed.facts, rows)
        of_alone = expected[str(task.get("z_loss", 0.0))]
        assert [loss, *losses] == pytest.approx(of_alone, rel=1e-6), (strategy, backend, task)


@pytest.mark.timeout(200)
def test_packed_conversations_train_as_each_alone(tmp_path: Path) -> None:
    chat_tokenizer(CHATML).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in _conversations()))
    for num_ranks in (1, 2):
        run_on_ranks(_on_ranks, num_ranks, tmp_path, [layout for layout in _LAYOUTS if layout[0] == num_ranks])
