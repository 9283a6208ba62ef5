"""Which samples a step was trained on."""

import numpy as np

from sharding.ranks.errors import UserError
from trainer.checkpoint.manifest import read_manifest
from trainer.config import RunConfig
from trainer.data.skipped_samples import SkippedSamples
from trainer.run_folder.folder import RunFolder


def positions_of_step(run_folder: RunFolder, config: RunConfig, step: int) -> np.ndarray:
    """Global sample positions, int64 [global_size], of a step, counted from 1.

    A run that was forked from one with another batch size has its own relation of samples to steps, and a run may have
    skipped samples on its way; each of its checkpoints knows both.

    Raises:
        UserError: the run was forked after that step.
    """
    newest = run_folder.newest_checkpoint()
    first, skipped = (step - 1) * config.batch.global_size, SkippedSamples(config.data.skip_samples)
    if newest is not None:
        training = read_manifest(newest[1]).training
        first = training.num_samples + (step - 1 - training.step) * config.batch.global_size
        skipped = SkippedSamples(training.skipped_samples)
    if first < 0:
        raise UserError(f"--step {step}: the run was forked after that step; ask the run it came from.")
    return skipped.positions(np.arange(first, first + config.batch.global_size))
