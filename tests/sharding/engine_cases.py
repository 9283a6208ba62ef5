"""Engines of a tiny model, for tests that run inside a process group."""

from typing import Any

import torch

from sharding.config import ParallelConfig
from sharding.engine import Batch, Engine
from sharding.mesh import build_mesh
from sharding.ranks.process_group import Ranks
from tests.support import TINY_MODEL
from trainer.config import RunConfig, parse_config
from trainer.data.facts import SampleFacts
from trainer.model.engine import build_model_engine
from trainer.tasks.registry import build_task

ON_2_RANKS = (
    ("torch", "ddp"),
    ("torch", "zero1"),
    ("torch", "zero2"),
    ("torch", "zero3"),
    ("bucketed", "zero1"),
    ("bucketed", "zero2"),
    ("bucketed", "zero3"),
    ("deepspeed", "zero1"),
    ("deepspeed", "zero2"),
    ("deepspeed", "zero3"),
    ("accelerate", "ddp"),
)
"""Every backend with every strategy that two ranks on a CPU carry out."""

NUM_TOKENS = 301
FACTS = SampleFacts(16, NUM_TOKENS, 0)
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")


def tiny_config(parallel: dict[str, Any], **sections: Any) -> RunConfig:
    """A run of the tiny model; no corpus is read."""
    values: dict[str, Any] = {
        "steps": 4,
        "model": TINY_MODEL,
        "data": {"sequence_length": 16},
        "optimizer": {"lr": 1e-2},
        # A step that 2, 3 and 4 ranks divide.
        "batch": {"global_size": 12, "micro_size": 1},
        "parallel": parallel,
    }
    return parse_config(values | sections, "test")


_PARALLEL_KEYS = ParallelConfig.model_fields.keys()


def tiny_engine(ranks: Ranks, strategy: str, **settings: Any) -> Engine:
    """An engine of the tiny model with fresh parameters; settings are of ``parallel`` or whole other sections."""
    parallel = {"strategy": strategy} | {key: value for key, value in settings.items() if key in _PARALLEL_KEYS}
    config = tiny_config(parallel, **{key: value for key, value in settings.items() if key not in _PARALLEL_KEYS})
    mesh = build_mesh(config.parallel, ranks)
    engine, _ = build_model_engine(config, build_task("causal-lm"), mesh, ranks, FACTS)
    return engine


def random_batch(seed: int, num_rows: int = 2, length: int = 16) -> Batch:
    """Random tokens and labels, some of them masked."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, NUM_TOKENS, (num_rows, length), generator=generator)
    labels = torch.randint(0, NUM_TOKENS, (num_rows, length), generator=generator)
    labels[0, length // 2 :] = -100
    return {"input_ids": tokens, "labels": labels}


def num_targets(batches: list[Batch], world_size: int) -> int:
    """Valid targets, where every rank has the same micro-batches."""
    return world_size * sum(int((batch["labels"] != -100).sum()) for batch in batches)


def train_steps(engine: Engine, ranks: Ranks, num_steps: int = 3, num_micro_batches: int = 2) -> list[float]:
    """Train on batches that every rank has alike; returns this rank's loss sums."""
    losses = []
    for step in range(num_steps):
        batches = [random_batch(10 * step + index) for index in range(num_micro_batches)]
        losses.append(float(engine.train_batch(batches, num_targets(batches, ranks.world_size))))
        engine.clip_grad_norm(1.0)
        engine.step(1e-2)
    return losses
