"""A task of one's own in a run: what it is given, and what it decides."""

import json
from pathlib import Path

import torch

from sharding.mesh import build_mesh
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess
from tests.sharding.engine_cases import FACTS, tiny_config
from tests.support import run_on_ranks
from tests.trainer.tasks.own_tasks import StartsAtOne
from trainer.accumulation import StepAgreement, agree_on_step
from trainer.data.samples import FILLER
from trainer.model.engine import build_model_engine

_ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))


def _train(ranks: Ranks, root: Path, corpus: Path) -> None:
    task = {"name": "tests.trainer.tasks.own_tasks:NotesWhatItIsGiven", "options": {"folder": str(root)}}
    RunsInProcess(ranks, root, corpus).train("own", steps=2, task=task, checkpoint={"every_steps": 0})


def test_samples_come_with_their_global_positions(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    run_on_ranks(_train, 2, tmp_path, shared_corpus[0])
    notes = [
        [json.loads(line) for line in (tmp_path / f"rank-{rank}.jsonl").read_text().splitlines()] for rank in range(2)
    ]
    for rank, own in enumerate(notes):
        training = [note["positions"] for note in own if note["training"]]
        # Two steps of two micro-batches of three samples.
        assert training == [[first + 3 * rank + i for i in range(3)] for first in (0, 6, 12, 18)]
        assert {(note["vocab_size"], note["sequence_length"]) for note in own} == {(301, 32)}
    evaluated = [p for own in notes for note in own if not note["training"] for p in note["positions"]]
    positions = sorted(p for p in evaluated if p != FILLER)
    assert positions == list(range(len(positions)))
    assert len(positions) > 0


def _agree(ranks: Ranks) -> None:
    agreed = agree_on_step(3 + ranks.rank, 100 + ranks.rank, stop=ranks.rank == 1, has_written=ranks.rank == 0)
    assert agreed == StepAgreement(num_targets=7, num_tokens=201, stop=True, all_have_written=False)


def test_ranks_agree_on_targets_and_tokens() -> None:
    run_on_ranks(_agree, 2)


def test_a_task_gives_initial_values_of_its_own() -> None:
    config = tiny_config({"strategy": "none"})
    engine, _ = build_model_engine(config, StartsAtOne(), build_mesh(config.parallel, _ALONE), _ALONE, FACTS)
    shards = engine.named_local_shards()
    assert bool((shards["model.layers.0.mlp.up_proj.weight"] == 1).all())
    assert 0 < float(shards["model.layers.0.mlp.down_proj.weight"].std()) < 0.1
