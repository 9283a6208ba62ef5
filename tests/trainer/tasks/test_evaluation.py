"""Evaluation that draws: the same for the same weights, on any number of ranks and in any micro-batches."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharding.engine import Batch
from sharding.mesh import build_mesh
from sharding.parallel_dims import Role
from sharding.ranks.errors import UserError
from sharding.ranks.object_exchange import gather_rows, sum_over_ranks
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import FACTS, random_batch, tiny_config
from tests.support import run_on_ranks
from trainer.data.packed import packed_rows
from trainer.data.samples import FILLER, MicroBatch
from trainer.model.engine import build_model_engine
from trainer.tasks.causal_lm import CausalLanguageModelling
from trainer.tasks.evaluation import Evaluation
from trainer.tasks.named_sums import NamedSums
from trainer.tasks.next_tokens import next_token_batch
from trainer.tasks.task import Outputs, Sums

_NUM_ROWS = 12


class _DrawsMasks(CausalLanguageModelling):
    """Replaces some tokens, in place."""

    def make_batch(self, samples: Batch, positions: torch.Tensor, training: bool) -> Batch:
        assert not training
        batch = super().make_batch(samples, positions, training)
        is_masked = torch.rand(batch["input_ids"].shape) < random.uniform(0.2, 0.4) + 0.1 * np.random.random()
        batch["input_ids"][is_masked] = 0
        return batch


class _DrawsInPass(_DrawsMasks):
    """Adds noise to the sums as well, and has one that is a matrix."""

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        noise = torch.rand(len(batch["labels"])).sum()
        sums = {name: total + noise for name, total in super().evaluate(outputs, batch).items()}
        return sums | {"matrix": noise * torch.arange(6.0).view(2, 3)}


class _KeepsFirstTokens(CausalLanguageModelling):
    """Keeps each sample's first token."""

    kept = frozenset({"first_tokens"})

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        return super().evaluate(outputs, batch) | {"first_tokens": batch["input_ids"][:, :1]}


class _DrawsAndKeeps(_KeepsFirstTokens):
    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        torch.rand(1)
        return super().evaluate(outputs, batch)


class _CountsPasses(CausalLanguageModelling):
    num_passes = num_batches = 0

    def make_batch(self, samples: Batch, positions: torch.Tensor, training: bool) -> Batch:
        self.num_batches += 1
        return super().make_batch(samples, positions, training)

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        self.num_passes += 1
        return super().evaluate(outputs, batch)


class _ForgetsFillers(CausalLanguageModelling):
    """Evaluates what only fills up."""

    def make_batch(self, samples: Batch, positions: torch.Tensor, training: bool) -> Batch:
        return next_token_batch(samples)


def _micro_batches(ranks: Ranks, micro_size: int, num_rows: int = _NUM_ROWS) -> Iterator[MicroBatch]:
    """As ``evaluation_batches`` divides twelve rows; those beyond a smaller number only fill up."""
    tokens = random_batch(3, num_rows=_NUM_ROWS, length=17)["input_ids"].numpy()
    for start in range(ranks.rank * micro_size, _NUM_ROWS, ranks.world_size * micro_size):
        positions = torch.arange(start, start + micro_size)
        samples = packed_rows(tokens[start : start + micro_size].copy())
        yield MicroBatch(samples, torch.where(positions < num_rows, positions, FILLER))


def _evaluate(ranks: Ranks, path: Path) -> None:
    config = tiny_config({"strategy": "ddp"})
    found: dict[str, list[float]] = torch.load(path) if path.exists() else {}
    for task in (_DrawsMasks(), _DrawsInPass()):
        mesh, named = build_mesh(config.parallel, ranks), NamedSums(task)
        engine, _ = build_model_engine(config, task, mesh, ranks, FACTS, evaluate=named)

        def sums(micro_size: int, seed: int, engine: Any = engine, task: Any = task, named: Any = named) -> list[float]:
            evaluation = Evaluation(engine, task, named, ranks, Role(ranks.rank, ranks.world_size), seed)
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
    by_name = named.by_name(torch.tensor([expected]))
    assert list(by_name) == ["loss", "matrix", "targets"]
    noise = by_name["matrix"][0, 1]
    assert by_name["matrix"].numpy() == pytest.approx((noise * torch.arange(6.0).view(2, 3)).numpy())
    evaluation = Evaluation(engine, task, named, ranks, Role(ranks.rank, ranks.world_size), 1)
    assert evaluation.metrics([]) == {}
    metrics = evaluation.metrics(_micro_batches(ranks, 2))
    assert metrics["loss"].value == pytest.approx(float(by_name["loss"] / by_name["targets"]), rel=1e-6)
    counting = _CountsPasses()
    mesh, named = build_mesh(config.parallel, ranks), NamedSums(counting)
    engine, _ = build_model_engine(config, counting, mesh, ranks, FACTS, evaluate=named)
    Evaluation(engine, counting, named, ranks, Role(ranks.rank, ranks.world_size), 1).sums(_micro_batches(ranks, 3))
    assert counting.num_passes == counting.num_batches == _NUM_ROWS // 3 // ranks.world_size
    # Rows that only fill up are not counted, and a task that counts them is refused.
    evaluation = Evaluation(engine, counting, named, ranks, Role(ranks.rank, ranks.world_size), 1)
    total = evaluation.sums(_micro_batches(ranks, 3, num_rows=7))
    assert total is not None
    assert named.by_name(gather_rows(total, ranks))["targets"] == 7 * 16
    # What is kept is all samples', one by one where anything is drawn.
    first_tokens = random_batch(3, num_rows=_NUM_ROWS, length=17)["input_ids"][:, 0]
    for keeping in (_KeepsFirstTokens(), _DrawsAndKeeps()):
        mesh, kept = build_mesh(config.parallel, ranks), NamedSums(keeping)
        keeper, _ = build_model_engine(config, keeping, mesh, ranks, FACTS, evaluate=kept)
        evaluation = Evaluation(keeper, keeping, kept, ranks, Role(ranks.rank, ranks.world_size), 1)
        for micro_size in (2, 3):
            total = evaluation.sums(_micro_batches(ranks, micro_size))
            assert total is not None
            all_kept = kept.by_name(gather_rows(total, ranks))
            assert all_kept["targets"] == _NUM_ROWS * 16
            assert sorted(all_kept["first_tokens"][:, 0].tolist()) == sorted(first_tokens.tolist())
    evaluation = Evaluation(engine, _ForgetsFillers(), named, ranks, Role(ranks.rank, ranks.world_size), 1)
    with pytest.raises(UserError, match=r"counts (32|48) targets in [23] samples at position -1"):
        evaluation.sums(_micro_batches(ranks, 3, num_rows=1))
    if ranks.rank == 0:
        torch.save(found, path)


@pytest.mark.timeout(200)
def test_draws_in_evaluation_belong_to_samples(tmp_path: Path) -> None:
    for num_ranks in (1, 2):
        run_on_ranks(_evaluate, num_ranks, tmp_path / "sums", timeout_s=90)
