"""Evaluation that draws: the same for the same weights, on any number of ranks and in any micro-batches."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sharding.engine import Batch
from sharding.mesh import build_mesh
from sharding.parallel_dims import Role
from sharding.ranks.object_exchange import sum_over_ranks
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import VOCABULARY, random_batch, tiny_config
from tests.support import run_on_ranks
from trainer.model.engine import build_model_engine
from trainer.tasks.causal_lm import CausalLanguageModelling
from trainer.tasks.evaluation import Evaluation

_NUM_ROWS = 12


class _DrawsMasks(CausalLanguageModelling):
    """Replaces some tokens, in place."""

    def make_batch(self, sequences: Batch) -> Batch:
        is_masked = torch.rand(sequences["input_ids"].shape) < random.uniform(0.2, 0.4) + 0.1 * np.random.random()
        sequences["input_ids"][is_masked] = 0
        return sequences


class _DrawsInPass(_DrawsMasks):
    """Adds noise to the loss as well."""

    def evaluation_sums(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return super().evaluation_sums(model, batch) + torch.rand(len(batch["labels"])).sum()


class _CountsPasses(CausalLanguageModelling):
    num_passes = num_batches = 0

    def make_batch(self, sequences: Batch) -> Batch:
        self.num_batches += 1
        return super().make_batch(sequences)

    def evaluation_sums(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        self.num_passes += 1
        return super().evaluation_sums(model, batch)


def _micro_batches(ranks: Ranks, micro_size: int) -> Iterator[Batch]:
    rows = random_batch(3, num_rows=_NUM_ROWS)
    for start in range(ranks.rank * micro_size, _NUM_ROWS, ranks.world_size * micro_size):
        yield {name: tensor[start : start + micro_size].clone() for name, tensor in rows.items()}


def _evaluate(ranks: Ranks, path: Path) -> None:
    config = tiny_config({"strategy": "ddp"})
    found: dict[str, list[float]] = torch.load(path) if path.exists() else {}
    for task in (_DrawsMasks(), _DrawsInPass()):
        engine, _ = build_model_engine(config, task, build_mesh(config.parallel, ranks), ranks, VOCABULARY)

        def sums(micro_size: int, seed: int, engine: Any = engine, task: Any = task) -> list[float]:
            evaluation = Evaluation(engine, task, ranks, Role(ranks.rank, ranks.world_size), seed)
            results = []
            for leftover in range(2):
                # What training leaves behind.
                torch.manual_seed(leftover)
                total = evaluation.sums(_micro_batches(ranks, micro_size))
                assert total is not None
                results.append(sum_over_ranks(total, ranks))
            assert results[0] == results[1]
            return results[0]

        expected = found.setdefault(type(task).__name__, sums(2, seed=1))
        for micro_size in (2, 3, 6):
            assert sums(micro_size, seed=1) == pytest.approx(expected, rel=1e-6), (type(task), micro_size)
        assert sums(2, seed=2) != pytest.approx(expected, rel=1e-6)
    assert Evaluation(engine, task, ranks, Role(ranks.rank, ranks.world_size), 1).sums([]) is None
    counting = _CountsPasses()
    engine, _ = build_model_engine(config, counting, build_mesh(config.parallel, ranks), ranks, VOCABULARY)
    Evaluation(engine, counting, ranks, Role(ranks.rank, ranks.world_size), 1).sums(_micro_batches(ranks, 3))
    assert counting.num_passes == counting.num_batches == _NUM_ROWS // 3 // ranks.world_size
    if ranks.rank == 0:
        torch.save(found, path)


@pytest.mark.timeout(200)
def test_draws_in_evaluation_belong_to_samples(tmp_path: Path) -> None:
    for num_ranks in (1, 2):
        run_on_ranks(_evaluate, num_ranks, tmp_path / "sums", timeout_s=90)
