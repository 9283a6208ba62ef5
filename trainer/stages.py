"""What belongs to each stage of a run: its samples and their order, evaluation, schedule; a run without has one."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from sharding.parallel_dims import Role
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from trainer.checkpoint.training_state import TrainingState
from trainer.config import RunConfig
from trainer.config.stages import Stage, errors_of_stage
from trainer.data.any_samples import prepared_samples
from trainer.data.documents import documents_in
from trainer.data.evaluation_sets import set_batches
from trainer.data.loader import BatchLoader, ReadBeside, evaluation_batches
from trainer.data.prepared import Prepared, PreparedStream
from trainer.data.prepared_stages import StageCorpus
from trainer.data.row_samples import RowSamples
from trainer.data.samples import MicroBatch, Samples
from trainer.data.skipped_samples import SkippedSamples
from trainer.data.streaming import StreamingLoader, state_of_rank
from trainer.numerics.spike_policy import SpikePolicy
from trainer.optimizers.schedules import learning_rate, sentence_after_curve
from trainer.trackers.observers import Observers


@dataclass(frozen=True)
class StageParts:
    """What the loop works with in a stage; a run without stages has one.

    Attributes:
        stage: its settings and place.
        fingerprint: identity of its corpus.
        build_loader: a loader that starts where the training is.
        evaluation_batches: this rank's share of the held-out samples, as micro-batches; equally many on every rank.
        evaluation_sets: the same of what else is evaluated, by name.
        spike_policy: judges each step's loss and gradient norm.
    """

    stage: Stage
    fingerprint: str
    build_loader: Callable[[TrainingState], BatchLoader | StreamingLoader]
    evaluation_batches: Callable[[], Iterable[MicroBatch]]
    evaluation_sets: Mapping[str, Callable[[], Iterable[MicroBatch]]]
    spike_policy: SpikePolicy

    def learning_rate(self, step: int, training: TrainingState) -> float:
        """The rate of a step of the run that is about to be taken, counted from 1."""
        first_step, total_steps = self._curve(training)
        config = self.stage.config
        return learning_rate(step - first_step, config.optimizer.lr, config.schedule, total_steps)

    def sentence_after_curve(self, training: TrainingState) -> str | None:
        """What to say of a stage that goes on after its learning-rate curve has ended; None where it does not."""
        first_step, total_steps = self._curve(training)
        end, step = self.stage.end_step - first_step, training.step - first_step
        return sentence_after_curve(self.stage.config.schedule, total_steps, step, end)

    def _curve(self, training: TrainingState) -> tuple[int, int]:
        """The step after which the curve begins, and its horizon in steps."""
        if training.stage_total_steps:
            return self.stage.first_step, training.stage_total_steps
        return 0, training.schedule_total_steps


def build_stage(
    one: StageCorpus,
    samples: Samples,
    role: Role,
    ranks: Ranks,
    observers: Observers,
    *,
    scales_loss: bool,
    beside: ReadBeside | None = None,
) -> StageParts:
    """Put together what belongs to a stage.

    Args:
        one: the stage, and what is prepared of it.
        samples: those of its corpus.
        role: this rank's among those that read different data.
        ranks: this rank's place.
        observers: who watches.
        scales_loss: see SpikePolicy.
        beside: see BatchLoader.

    Raises:
        UserError: its corpus is too small, or nothing is held out where that is to be evaluated.
    """
    config, corpus = one.stage.config, one.corpus
    with errors_of_stage(one.stage.name):
        corpus.check_sequence_length(config.data.sequence_length)
        check_held_out(config, samples)
    return StageParts(
        stage=one.stage,
        fingerprint=samples.fingerprint,
        build_loader=lambda training: _build_loader(config, corpus, role, training, beside),
        evaluation_batches=lambda: evaluation_batches(
            samples,
            "validation",
            micro_size=config.batch.micro_size,
            dp_rank=role.rank,
            dp_degree=role.degree,
            max_samples=config.evaluation.max_sequences,
            spread=bool(config.data.mixture) or config.data.has_rows,
        ),
        evaluation_sets=set_batches(config, corpus, one.sets, role),
        spike_policy=SpikePolicy(
            config,
            ranks,
            observers,
            lambda ranges: [] if config.data.streaming else documents_in(config, corpus, ranges),
            scales_loss=scales_loss,
        ),
    )


def check_held_out(config: RunConfig, samples: Samples) -> None:
    """Assert that there is something to evaluate where that was asked for.

    Raises:
        UserError: there is not.
    """
    every_steps = config.evaluation.every_steps
    if every_steps and samples.num_samples("validation") == 0:
        if config.data.factory is not None:
            which, remedy = f"data.factory={config.data.factory}", "let it"
        else:
            which = f"data.validation_fraction={config.data.validation_fraction:g}"
            # Of few, all may be on one side.
            remedy = "raise it, or give more documents, of which each is held out whole or not at all"
            remedy = "raise it" if config.data.has_rows else remedy
        raise UserError(
            f"evaluation.every_steps={every_steps} evaluates held-out samples, but {which} holds out none of these; "
            f"{remedy}, or set evaluation.every_steps=0."
        )


def _build_loader(
    config: RunConfig, corpus: Prepared, role: Role, training: TrainingState, beside: ReadBeside | None
) -> BatchLoader | StreamingLoader:
    """A loader that starts where the training is.

    Raises:
        UserError: the place in a stream is of another number of ranks.
    """
    data, batch = config.data, config.batch
    if isinstance(corpus, PreparedStream):
        return StreamingLoader(
            corpus,
            data,
            seed=config.seed,
            global_size=batch.global_size,
            micro_size=batch.micro_size,
            dp_rank=role.rank,
            dp_degree=role.degree,
            start_sample=training.num_corpus_samples,
            state=state_of_rank(training.loader_states, training.num_corpus_samples, role.rank, role.degree),
        )
    samples = prepared_samples(corpus, data, verify=config.faults.verify_data)
    return BatchLoader(
        samples,
        corpus.order(config.seed, data),
        global_size=batch.global_size,
        micro_size=batch.micro_size,
        dp_rank=role.rank,
        dp_degree=role.degree,
        start_sample=training.num_corpus_samples,
        skipped=SkippedSamples(training.skipped_samples),
        lengths=samples.lengths if data.bucket_by_length and isinstance(samples, RowSamples) else None,
        beside=beside,
    )
