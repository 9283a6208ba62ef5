"""The Trainer: one step after another until the run is finished or asked to stop."""

import gc
from contextlib import suppress
from enum import Enum
from typing import Any

from sharding.engine import Batch
from sharding.loss_scaler import num_halvings
from sharding.ranks.errors import AgreedError, NonFiniteFailure, RunFailure, UserError
from trainer.accumulation import agree_on_step
from trainer.checkpoint.finish import after_evaluation, finish_reason
from trainer.checkpoint.stage_state import in_stages, initial_state
from trainer.checkpoint.training_state import Better, TrainingState
from trainer.config import RunConfig
from trainer.config.data import SampleRange
from trainer.data.batch import pinned
from trainer.data.loader import BatchLoader
from trainer.data.samples import MicroBatch
from trainer.data.skipped_samples import SkippedSamples
from trainer.data.streaming import StreamingLoader, gather_states
from trainer.metrics.class_table import write_class_table
from trainer.metrics.clock import ThroughputClock
from trainer.metrics.file import Metrics, MetricsFile
from trainer.metrics.goodput import Category
from trainer.metrics.noise_scale import NoiseScale, train_and_measure
from trainer.metrics.step import SkippedSteps, StepRecord, mfu_metrics, summarize_step
from trainer.numerics.spike_policy import TakenStep
from trainer.parts import TrainerParts
from trainer.runtime.phases import Phase
from trainer.runtime.randomness import seed_step

_GC_EVERY_STEPS = 100
# Between log lines, skipped steps are counted on the device and looked at so often, each time as they were at the last
# look: a series of them ends the run at most twice as many steps after it has become too long.
_LOOK_EVERY_STEPS = 10


class ExitReason(Enum):
    """How a run's loop ended."""

    FINISHED = "finished"
    STOPPED = "stopped"


class Trainer:
    """Trains one run on one rank.

    The loop, in short::

        for step in steps:
            take this rank's micro-batches
            agree with the other ranks on the number of targets and on stopping
            engine.train_batch -> clip -> step
            every few steps: metrics, evaluation, checkpoint
    """

    def __init__(self, config: RunConfig, parts: TrainerParts) -> None:
        """Bind the loop to its parts."""
        self._config = config
        self._parts = parts
        self._stage = parts.stages[0]
        self._training = initial_state(config, self._stage.stage, parts.fingerprints)
        self._skipped = SkippedSteps(parts.ranks.device)
        self._clock = ThroughputClock(parts.phases, parts.busy.take_s)
        self._noise_scale = NoiseScale() if config.metrics.gradient_noise_scale else None
        self._metrics_file: MetricsFile | None = None
        self._loader: BatchLoader | StreamingLoader | None = None
        self._loader_state: dict[str, Any] | None = None
        # The run rolled back to a checkpoint, which does not say what is skipped from now on; the next step's will.
        self._owes_step = False
        # Value and better direction of each metric, of the last evaluation.
        self._evaluated: dict[str, tuple[float, Better]] = {}

    @property
    def step(self) -> int:
        """Finished steps."""
        return self._training.step

    @property
    def parts(self) -> TrainerParts:
        """What the loop works with."""
        return self._parts

    @property
    def next_samples(self) -> list[SampleRange]:
        """Global positions of the samples of the step that is being taken."""
        first = self._training.num_corpus_samples
        skipped = SkippedSamples(self._training.skipped_samples)
        return skipped.ranges_between(first, first + self._stage.stage.config.batch.global_size)

    @property
    def finish_reason(self) -> str | None:
        """Why nothing is left to train; None while something is. The same on all ranks."""
        return finish_reason(self._training, self._config)

    def resume_or_init(self) -> None:
        """Continue from a checkpoint where there is one.

        Raises:
            UserError: the checkpoint cannot be used.
        """
        self._parts.phases.enter(Phase.LOAD)
        restored = self._parts.checkpointer.resume(self._parts.engine)
        if restored is not None:
            stage = self._parts.stage_of(restored.step)
            skipped = stage.stage.config.data.skip_samples
            self._restore(stage.spike_policy.skip_configured(restored, skipped))
        self._parts.pruning.begin(self.step)
        self._warn_after_curve()
        self._open_metrics_file()

    def fit(self) -> ExitReason:
        """Train until the run is finished or a stop is agreed; either way the last step, if there was one, is saved.

        Raises:
            RunFailure: too many steps in a row were not finite.
            UserError: a checkpoint could not be written.
        """
        if self.finish_reason is not None:
            return ExitReason.FINISHED
        # Collections at different moments on different ranks would hold up one another at every collective.
        gc.disable()
        try:
            return self._fit()
        except (RunFailure, AgreedError):
            # All ranks have come to it alike, so what was saved before it can still be made valid. It is the reason
            # that counts, also where that fails.
            with suppress(UserError, RunFailure):
                self._finish_saving()
            raise
        finally:
            self._close_loader()
            self._parts.profiler.close()
            gc.enable()

    def close(self) -> None:
        """Close files, and see old checkpoints deleted."""
        self._parts.checkpointer.close()
        if self._metrics_file is not None:
            self._metrics_file.close()

    def _fit(self) -> ExitReason:
        self._clock.restart()
        first_step = self.step + 1
        phases = self._parts.phases
        # The step after this one is not always the next: one may be taken again, and the run may roll back.
        while self.finish_reason is None:
            self._cross_boundary()
            step = self.step + 1
            loader = self._open_loader()
            seed_step(self._config.seed, step, self._parts.mesh.data.rank)
            phases.enter(Phase.DATA, step)
            micro_batches = self._make_batches(loader.next_step())
            # What another rank counts is not counted here.
            counted = micro_batches if self._parts.mesh.counts_targets else []
            num_targets = sum(self._parts.task.num_targets(batch) for batch in counted)
            num_tokens = sum(self._parts.task.num_tokens(batch) for batch in counted)
            phases.enter(Phase.AGREE)
            checkpointer = self._parts.checkpointer
            agreed = agree_on_step(num_targets, num_tokens, self._parts.is_stop_requested(), checkpointer.has_written)
            if agreed.all_have_written:
                self._finish_saving()
            if agreed.stop:
                if self._judge_steps():
                    continue
                if not self._owes_step:
                    # Before the first step there is nothing to save: no optimizer has moments yet that could be
                    # loaded again, and the run begins anew as it has begun.
                    if self.step:
                        self._save(waits=True)
                    return ExitReason.STOPPED
            phases.enter(Phase.TRAIN)
            with self._parts.profiler.step():
                record = self._train_step(step, micro_batches, agreed.num_targets)
            if record is None:
                continue
            self._owes_step = False
            # Not before: a step that was taken and then given up for a stop comes again.
            self._loader_state = loader.state()
            self._clock.add_step(agreed.num_tokens)
            if step == first_step:
                self._parts.after_first_step()
            self._after_step(record)
            if step % _GC_EVERY_STEPS == 0:
                gc.collect(1)
        self._save(waits=True)
        return ExitReason.FINISHED

    def _make_batches(self, micro_batches: list[MicroBatch]) -> list[Batch]:
        task = self._parts.task
        return [
            pinned(task.make_batch(micro.samples, micro.positions, training=True) | micro.beside)
            for micro in micro_batches
        ]

    def _train_step(self, step: int, micro_batches: list[Batch], num_targets: int) -> StepRecord | None:
        """Take one step; None where its samples were skipped instead, and nothing else has changed."""
        engine, config = self._parts.engine, self._stage.stage.config
        rate = self._stage.learning_rate(step, self._training)
        noise = None
        if self._noise_scale is not None and is_due(step, self._config.metrics.every_steps):
            counts = [self._parts.task.num_targets(batch) for batch in micro_batches]
            loss_sum, noise = train_and_measure(engine, micro_batches, counts, num_targets)
        else:
            loss_sum = engine.train_batch(micro_batches, num_targets)
        self._parts.pruning.mask_gradients()
        grad_norm = engine.clip_grad_norm(config.optimizer.clip_norm)
        taken = TakenStep(step, self._training.num_corpus_samples, loss_sum, grad_norm, num_targets)
        if self._stage.spike_policy.judges_at_once:
            bad = self._stage.spike_policy.judge_at_once(taken)
            if bad is not None:
                engine.drop_gradients()
                # The step is taken again, as if these samples had never been there.
                self._training = self._stage.spike_policy.skip(bad, self._training)
                self._close_loader()
                return None
        self._parts.pruning.add_gradients(grad_norm)
        stepped = engine.step(rate)
        self._skipped.add(stepped)
        self._stage.spike_policy.add(taken)
        self._parts.after_update(step, stepped)
        self._training = self._training.model_copy(
            update={
                "step": step,
                "num_samples": self._training.num_samples + config.batch.global_size,
                "num_tokens": self._training.num_tokens + num_targets,
                "eval_metrics": {},
            }
        )
        return StepRecord(loss_sum, num_targets, grad_norm, rate, engine.loss_scale, noise)

    def _after_step(self, record: StepRecord) -> None:
        step, config = self.step, self._config
        ends_stage = step == self._stage.stage.end_step
        if is_due(step, config.faults.replica_check_every_steps):
            self._wait_for_device()
            self._parts.compare_replicas(step)
        evaluates = ends_stage or is_due(step, config.evaluation.every_steps)
        logs = evaluates or is_due(step, config.metrics.every_steps)
        saves = ends_stage or is_due(step, config.checkpoint.every_steps)
        if (logs or saves or self._stage.spike_policy.is_overdue) and self._judge_steps():
            return
        if logs:
            self._log(record, evaluates=evaluates)
        elif is_due(step, _LOOK_EVERY_STEPS):
            self._refuse_skips(self._skipped.look())
        if not logs and self._parts.ranks.rank == 0:
            self._parts.observers.advance(step)
        # The last step is saved by the caller.
        if saves and step != config.num_steps:
            self._save(waits=False)

    def _judge_steps(self) -> bool:
        """Judge the steps since the last time; whether the run has rolled back to a checkpoint."""
        restored = self._stage.spike_policy.judge(self._training, self._load_until)
        if restored is None:
            return False
        self._restore(restored)
        self._owes_step = True
        self._open_metrics_file()
        self._parts.observers.rolled_back()
        self._close_loader()
        self._clock.restart()
        return True

    def _load_until(self, last_step: int) -> TrainingState | None:
        self._parts.phases.enter(Phase.LOAD)
        return self._parts.checkpointer.roll_back(self._parts.engine, last_step)

    def _restore(self, restored: TrainingState) -> None:
        """Go on from the counters of a checkpoint whose tensors were loaded."""
        total_steps = self._config.schedule.total_steps or restored.schedule_total_steps
        restored = restored.model_copy(update={"schedule_total_steps": total_steps})
        self._stage = self._parts.stage_of(restored.step)
        self._training = in_stages(restored, self._stage.stage, self._parts.fingerprints)
        self._skipped = SkippedSteps(
            self._parts.ranks.device, restored.num_skipped_steps, restored.num_skipped_in_a_row
        )
        self._stage.spike_policy.restore(restored)
        if self._noise_scale is not None:
            self._noise_scale = NoiseScale(restored.noise_gradient_square, restored.noise_variance)

    def _cross_boundary(self) -> None:
        """Go on with the next stage where this one has ended, whose last step was judged and saved."""
        if not self._stage.stage.name or self.step != self._stage.stage.end_step:
            return
        self._close_loader()
        self._stage, self._training = self._parts.begin_next(self._stage, self._training)
        self._warn_after_curve()

    def _warn_after_curve(self) -> None:
        if sentence := self._stage.sentence_after_curve(self._training):
            self._parts.observers.warn(sentence)

    def _open_metrics_file(self) -> None:
        self.close()
        if self._parts.ranks.rank == 0:
            self._metrics_file = MetricsFile(self._parts.observers.metrics_path, self.step)

    def _open_loader(self) -> BatchLoader | StreamingLoader:
        if self._loader is None:
            self._loader = self._stage.build_loader(self._training)
            self._loader_state = self._loader.state()
        return self._loader

    def _close_loader(self) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _log(self, record: StepRecord, *, evaluates: bool) -> None:
        parts = self._parts
        self._wait_for_device()
        parts.phases.enter(Phase.LOG)
        metrics, longest_skip = summarize_step(
            record, self._skipped, self._clock, parts.meter, parts.ranks, self._noise_scale
        )
        metrics |= {"train/tokens": self._training.num_tokens} | parts.pruning.metrics()
        metrics |= mfu_metrics(metrics, parts.facts, self._stage.stage.config.data.sequence_length, parts.peak_flops)
        if self._stage.stage.name:
            metrics["train/stage"] = self._stage.stage.index + 1
        if evaluates:
            metrics |= self.evaluate()
            self._training = after_evaluation(self._training, self._config, self._evaluated)
        metrics |= self._clock.time_shares(metrics["throughput/data_wait_fraction"] or 0.0)
        metrics["checkpoint/blocking_s"] = self._clock.spent_s(Category.CHECKPOINT)
        if parts.checkpointer.last_write_s is not None:
            metrics["checkpoint/write_s"] = parts.checkpointer.last_write_s
        if self._metrics_file is not None:
            metrics |= parts.observers.goodput()
            self._metrics_file.write(self.step, metrics)
            parts.observers.log(self.step, metrics)
        self._refuse_skips(longest_skip)
        self._clock.restart()

    def _refuse_skips(self, longest: int) -> None:
        """Assert that no series of skipped steps is too long; every rank has counted the same."""
        halvings = 0 if self._parts.engine.loss_scale is None else num_halvings(self._config.precision)
        if longest >= self._config.faults.max_nonfinite_steps + halvings:
            raise NonFiniteFailure(
                f"the loss or a gradient was not finite in {longest} steps in a row before step {self.step + 1} "
                f"(faults.max_nonfinite_steps={self._config.faults.max_nonfinite_steps}), all of them skipped; "
                "lower optimizer.lr, lengthen schedule.warmup_steps or look at the data of these steps."
            )

    def evaluate(self) -> Metrics:
        """The task's metrics on the held-out split, and those of the averaged weights as ``eval/ema_...``.

        Every rank must call it. Empty where nothing is held out.
        """
        average = self._parts.weight_average
        with self._parts.phases.during(Phase.EVALUATE):
            evaluated, class_table = self._parts.evaluate_weights(self._stage)
            if average is not None and evaluated:
                with average.in_place_of_weights():
                    averaged, _ = self._parts.evaluate_weights(self._stage)
                evaluated |= {f"ema_{name}": metric for name, metric in averaged.items()}
        if class_table is not None and self._metrics_file is not None:
            write_class_table(self._parts.observers.metrics_path.parent, self.step, class_table)
        self._evaluated = {name: (metric.value, metric.better) for name, metric in evaluated.items()}
        return {f"eval/{name}": metric.value for name, metric in evaluated.items()}

    def _save(self, *, waits: bool) -> None:
        """Save this step; ``waits`` until it is written, also where training could go on meanwhile."""
        self._wait_for_device()
        # A corrupt copy must not go into a checkpoint.
        self._parts.compare_replicas(self.step)
        self._parts.phases.enter(Phase.SAVE)
        # Waits for the device, as saving does anyway.
        training = self._training.model_copy(
            update={
                "num_skipped_steps": int(self._skipped.total.item()),
                "num_skipped_in_a_row": int(self._skipped.in_a_row.item()),
                "noise_gradient_square": self._noise_scale.gradient_square if self._noise_scale else 0.0,
                "noise_variance": self._noise_scale.variance if self._noise_scale else 0.0,
                **self._stage.spike_policy.state(),
                "trackers": self._parts.observers.tracker_state(),
                "loader_states": gather_states(self._loader_state, self._parts.mesh.dims, self._parts.ranks),
            }
        )
        checkpointer = self._parts.checkpointer
        (checkpointer.save if waits else checkpointer.start_saving)(self._parts.engine, training)

    def _finish_saving(self) -> None:
        # A failure that this comes after is reported from the phase that it came in.
        with self._parts.phases.during(Phase.SAVE):
            self._parts.checkpointer.finish()

    def _wait_for_device(self) -> None:
        """Wait until all steps are computed, so that the phase that follows, which would wait, is not blamed for it."""
        self._skipped.total.item()


def is_due(step: int, every_steps: int) -> bool:
    """Whether something that happens every so many steps happens after this one; 0 means never."""
    return every_steps > 0 and step % every_steps == 0
