"""Saving and reading canonical state without a run, for tests of engines."""

from pathlib import Path

import torch

from sharding.engine import Engine
from sharding.part import part_of
from sharding.ranks.process_group import Ranks
from trainer.checkpoint.rank_file import write_rank_file
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.tensor_file import DTYPES, TensorFile
from trainer.checkpoint.training_state import TrainingState
from trainer.checkpoint.writer import CheckpointIdentity, commit_checkpoint, prepare_checkpoint
from trainer.files.storage import CheckpointPath


def save_state(engine: Engine, folder: Path, ranks: Ranks) -> None:
    """Save an engine's state as that of some run, and wait for it; every rank must call it."""
    counters = dict.fromkeys(("num_samples", "num_tokens", "num_skipped_steps", "num_skipped_in_a_row", "seed"), 0)
    training = TrainingState(step=3, schedule_total_steps=6, **counters)
    identity = CheckpointIdentity(config={}, data_fingerprint="none", strategy="none")
    parts = engine.state(with_optimizer=True)
    prepare_checkpoint(folder, parts, training.step, ranks, lambda: None)
    commit_checkpoint(folder, write_rank_file(folder, parts, ranks.rank), training, identity, ranks, lambda: None)


def stored_state(folder: CheckpointPath) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, model and optimizer, put together from its slices; those of its base too."""
    reader = CheckpointReader(folder)
    state = {}
    for name, entry in reader.tensors.items():
        state[name] = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        reader.read_into(part_of(name, state[name]))
    return state


def whole_tensor(file: TensorFile, key: str) -> torch.Tensor:
    """A stored tensor."""
    code, shape = file.header[key]
    tensor = torch.empty(shape, dtype=DTYPES[code])
    file.read_into(key, tuple(slice(0, size) for size in shape), tensor)
    return tensor
