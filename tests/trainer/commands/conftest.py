"""A run's folder with a checkpoint, made without training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sharding.mesh import build_mesh
from sharding.ranks.process_group import Ranks
from tests.support import tiny_values
from trainer.attempt import begin_attempt
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.training_state import TrainingState
from trainer.config import parse_config
from trainer.config.rules import World
from trainer.data.packed import sample_facts
from trainer.data.prepare import prepare_corpus
from trainer.model.engine import build_model_engine
from trainer.run_folder.folder import RunFolder
from trainer.tasks.registry import build_task

_ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
_COUNTERS = dict.fromkeys(("num_samples", "num_tokens", "num_skipped_steps", "num_skipped_in_a_row"), 0)


@pytest.fixture
def save(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> Callable[..., CheckpointReader]:
    """A run's folder with a checkpoint of initial parameters."""
    corpus_dir, cache = shared_corpus

    def run(**sections: Any) -> CheckpointReader:
        values = tiny_values(tmp_path / "runs", cache, corpus_dir) | {"parallel": {"strategy": "none"}} | sections
        config = parse_config(values, "test")
        corpus = prepare_corpus(config.data)
        folder = RunFolder(config.run_dir)
        begin_attempt(folder, config, World(1, has_gpu=False), [])
        mesh = build_mesh(config.parallel, _ALONE)
        facts = sample_facts(corpus, config.data)
        engine, _ = build_model_engine(config, build_task(config.task.name), mesh, _ALONE, facts)
        checkpointer = Checkpointer(config, folder, lambda _: corpus.fingerprint, _ALONE, lambda: None)
        checkpointer.start_saving(engine, TrainingState(step=1, schedule_total_steps=9, seed=1, **_COUNTERS))
        checkpointer.finish()
        return CheckpointReader(folder.checkpoint_path(1))

    return run
