"""Which samples a step was trained on."""

import numpy as np

from sharding.ranks.errors import UserError
from trainer.checkpoint.manifest import read_manifest
from trainer.checkpoint.training_state import TrainingState
from trainer.config import RunConfig
from trainer.config.stages import stage_of_step, stages_of
from trainer.data.skipped_samples import SkippedSamples
from trainer.run_folder.folder import RunFolder


def positions_of_step(run_folder: RunFolder, config: RunConfig, step: int) -> np.ndarray:
    """Positions in its corpus, int64 [global_size], of the samples of a step, counted from 1.

    A run that was forked from one with another batch size has its own relation of samples to steps, a fork may have
    begun another corpus, and a run may have skipped samples on its way; each of its checkpoints knows all of these.

    Raises:
        UserError: the run was forked after that step, or has fewer steps.
    """
    stages = stages_of(config)
    stage = stage_of_step(stages, step)
    if config.stages and step > stage.end_step:
        raise UserError(f"--step {step}: the stages of the run come to {stage.end_step} steps; name one of these.")
    global_size, newest = stage.config.batch.global_size, run_folder.newest_checkpoint()
    # What comes after the newest checkpoint's stage begins where that ends.
    first = (step - 1 - stage.first_step) * global_size
    skipped = SkippedSamples(stage.config.data.skip_samples)
    if newest is not None:
        training = read_manifest(newest[1]).training
        trained = stage_of_step(stages, training.step)
        if stage.index == trained.index:
            first = training.num_corpus_samples + (step - 1 - training.step) * global_size
            skipped = SkippedSamples(training.skipped_samples)
        elif stage.index < trained.index:
            first, skipped = _of_ended(training, stage.name, step, global_size)
    if first < 0:
        raise UserError(f"--step {step}: the run was forked after that step; ask the run it came from.")
    return skipped.positions(np.arange(first, first + global_size))


def _of_ended(training: TrainingState, name: str, step: int, global_size: int) -> tuple[int, SkippedSamples]:
    """Number of the first sample of a step in a stage that has ended, and what is skipped there."""
    record = training.stages.get(name)
    if record is None or record.first_step is None:
        return -1, SkippedSamples()
    return (step - 1 - record.first_step) * global_size, SkippedSamples(record.skipped_samples)
