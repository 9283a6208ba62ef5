"""How a run's state passes from one corpus to the next: at the boundary of stages, and in a fork; imports no torch."""

from collections.abc import Mapping

from trainer.checkpoint.training_state import MonitorState, StageRecord, TrainingState
from trainer.config import RunConfig
from trainer.config.stages import Stage
from trainer.data.skipped_samples import SkippedSamples


def initial_state(config: RunConfig, stage: Stage, fingerprints: Mapping[str, str]) -> TrainingState:
    """The state of a run before its first step.

    Args:
        config: the run.
        stage: its first stage.
        fingerprints: of the corpora of all stages by name.
    """
    training = TrainingState(
        step=0,
        num_samples=0,
        num_tokens=0,
        num_skipped_steps=0,
        num_skipped_in_a_row=0,
        schedule_total_steps=config.schedule.total_steps or config.num_steps,
        seed=config.seed,
    )
    return on_another_corpus(training, stage, fingerprints)


def after_boundary(training: TrainingState, ended: Stage, stage: Stage) -> TrainingState:
    """The state in which a stage begins, from the one after the last step of the stage before.

    Counters go on; positions start anew, and so do the statistics of losses that spikes are judged by, since another
    corpus has other losses.
    """
    left = training.stages[ended.name].model_copy(update={"skipped_samples": training.skipped_samples})
    return _at_start(training.model_copy(update={"stages": training.stages | {ended.name: left}}), stage)


def on_another_corpus(training: TrainingState, stage: Stage, fingerprints: Mapping[str, str]) -> TrainingState:
    """The state in which a fork goes on with another corpus than its origin's, at the beginning of that corpus.

    Args:
        training: the origin's state.
        stage: the one that its last step belongs to in the fork.
        fingerprints: of the corpora of all stages by name.
    """
    records = {name: StageRecord(data_fingerprint=fingerprint) for name, fingerprint in fingerprints.items()}
    return _at_start(training.model_copy(update={"stages": records if stage.name else {}}), stage)


def in_stages(training: TrainingState, stage: Stage, fingerprints: Mapping[str, str]) -> TrainingState:
    """The state of a checkpoint in the stages of this run, which may be more than when it was saved, or a fork's.

    Args:
        training: the checkpoint's state.
        stage: the one that its last step belongs to.
        fingerprints: of the corpora of all stages by name.
    """
    if not stage.name:
        return training.model_copy(update={"stages": {}, "stage_total_steps": 0})
    records = {name: StageRecord(data_fingerprint=fingerprint) for name, fingerprint in fingerprints.items()}
    records |= {name: record for name, record in training.stages.items() if record.first_step is not None}
    if records[stage.name].first_step is None:
        # A run without stages was the whole of it.
        records[stage.name] = records[stage.name].model_copy(update={"first_step": stage.first_step})
    own = stage.config.schedule.total_steps or training.stage_total_steps or stage.config.num_steps
    return training.model_copy(update={"stages": records, "stage_total_steps": own if stage.has_own_schedule else 0})


def _at_start(training: TrainingState, stage: Stage) -> TrainingState:
    """The state at the beginning of a stage's corpus."""
    changes: dict[str, object] = {
        "first_sample": training.num_samples,
        "recent_losses": [],
        "recent_grad_norms": [],
        "loader_states": [],
        "stage_total_steps": 0,
    }
    skipped = SkippedSamples(stage.config.data.skip_samples)
    if "/" not in training.monitor.metric:
        # What is held out is another thing now; a set of evaluation.sets is the same.
        changes["monitor"] = MonitorState()
    if stage.name:
        begun = training.stages[stage.name].model_copy(update={"first_step": training.step, "skipped_samples": []})
        changes["stages"] = training.stages | {stage.name: begun}
        if stage.has_own_schedule:
            changes["stage_total_steps"] = stage.config.schedule.total_steps or stage.config.num_steps
    return training.model_copy(update=changes | {"skipped_samples": list(skipped.ranges)})
