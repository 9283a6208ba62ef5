"""Saving and reading canonical state without a run, for tests of engines."""

from collections.abc import Callable

import torch

from sharding.part import Part
from sharding.ranks.process_group import Ranks
from trainer.checkpoint.rank_file import write_rank_file
from trainer.checkpoint.tensor_file import DTYPES, TensorFile
from trainer.checkpoint.training_state import TrainingState
from trainer.checkpoint.writer import CheckpointIdentity, commit_checkpoint, prepare_checkpoint
from trainer.files.storage import CheckpointPath


def save_checkpoint(
    folder: CheckpointPath,
    parts: list[Part],
    training: TrainingState,
    identity: CheckpointIdentity,
    ranks: Ranks,
    before_commit: Callable[[], None] = lambda: None,
) -> None:
    """Write one checkpoint and wait for it; every rank must call it."""
    prepare_checkpoint(folder, parts, training.step, ranks, before_commit)
    commit_checkpoint(folder, write_rank_file(folder, parts, ranks.rank), training, identity, ranks, before_commit)


def whole_tensor(file: TensorFile, key: str) -> torch.Tensor:
    """A stored tensor."""
    code, shape = file.header[key]
    tensor = torch.empty(shape, dtype=DTYPES[code])
    file.read_into(key, tuple(slice(0, size) for size in shape), tensor)
    return tensor
