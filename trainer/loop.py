"""The Trainer: one step after another until the run is finished or asked to stop."""

import gc
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from sharding.engine import Batch, Engine
from sharding.errors import NonFiniteFailure
from sharding.process_group import Ranks
from trainer.accumulation import agree_on_step
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.manifest import TrainingState
from trainer.config import RunConfig
from trainer.data.loader import BatchLoader
from trainer.data.streaming import StreamingLoader, gather_states
from trainer.metrics import (
    Metrics,
    MetricsFile,
    SkippedSteps,
    StepRecord,
    ThroughputClock,
    sum_over_ranks,
    summarize_step,
)
from trainer.models import ModelFacts
from trainer.noise_scale import NoiseScale, train_and_measure
from trainer.observers import Observers
from trainer.phases import Phase, Phases
from trainer.profiling import StepProfiler
from trainer.randomness import seed_step
from trainer.schedules import learning_rate
from trainer.system_metrics import SystemMeter
from trainer.tasks.task import Task
from trainer.weight_average import WeightAverage

_GC_EVERY_STEPS = 100


class Ending(Enum):
    """How a run's loop ended."""

    FINISHED = "finished"
    STOPPED = "stopped"


@dataclass(frozen=True)
class TrainerParts:
    """What the loop works with; built in ``trainer.build``.

    Attributes:
        engine: the sharded model and optimizer.
        task: batches and metrics.
        ranks: this rank's place.
        dp_rank: place among the ranks that read different data.
        build_loader: a loader that starts where the training is.
        evaluation_batches: this rank's share of the held-out sequences; equally many on every rank.
        checkpointer: saving and resuming.
        observers: console, trackers; silent on all ranks but the first.
        phases: what this rank is doing; the loop tells it.
        is_stop_requested: whether this rank was asked to stop.
        after_first_step: called once; lowers the collectives' time limit.
        facts: size of the model.
        meter: use of nodes and GPUs.
        peak_flops: dense peak of one device in FLOP/s, where known.
        weight_average: moving average of the weights, where one is kept.
    """

    engine: Engine
    task: Task
    ranks: Ranks
    dp_rank: int
    build_loader: Callable[[TrainingState], BatchLoader | StreamingLoader]
    evaluation_batches: Callable[[], Iterable[Batch]]
    checkpointer: Checkpointer
    observers: Observers
    phases: Phases
    is_stop_requested: Callable[[], bool]
    after_first_step: Callable[[], None]
    profiler: StepProfiler
    meter: SystemMeter
    facts: ModelFacts
    peak_flops: float | None
    weight_average: WeightAverage | None = None


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
        self._training = self._initial_state()
        self._skipped = SkippedSteps(parts.ranks.device)
        self._clock = ThroughputClock()
        self._noise_scale = NoiseScale() if config.metrics.gradient_noise_scale else None
        self._metrics_file: MetricsFile | None = None
        self._loader_state: dict[str, Any] | None = None

    @property
    def step(self) -> int:
        """Finished steps."""
        return self._training.step

    def resume_or_init(self) -> None:
        """Continue from a checkpoint where there is one.

        Raises:
            UserError: the checkpoint cannot be used.
        """
        self._parts.phases.enter(Phase.LOAD)
        restored = self._parts.checkpointer.resume(self._parts.engine)
        if restored is not None:
            total_steps = self._config.schedule.total_steps or restored.schedule_total_steps
            self._training = restored.model_copy(update={"schedule_total_steps": total_steps})
            self._skipped = SkippedSteps(
                self._parts.ranks.device, restored.num_skipped_steps, restored.num_skipped_in_a_row
            )
            if self._noise_scale is not None:
                self._noise_scale = NoiseScale(restored.noise_gradient_square, restored.noise_variance)
        if self._parts.ranks.rank == 0:
            self._metrics_file = MetricsFile(self._parts.observers.metrics_path, self.step)

    def fit(self) -> Ending:
        """Train up to ``steps``, or until a stop is agreed; either way the last step is saved.

        Raises:
            RunFailure: too many steps in a row were not finite.
            UserError: a checkpoint could not be written.
        """
        if self.step >= self._config.num_steps:
            return Ending.FINISHED
        # Collections at different moments on different ranks would hold up one another at every collective.
        gc.disable()
        loader = self._parts.build_loader(self._training)
        try:
            return self._fit(loader)
        finally:
            loader.close()
            self._parts.profiler.close()
            gc.enable()

    def close(self) -> None:
        """Close files."""
        if self._metrics_file is not None:
            self._metrics_file.close()

    def _fit(self, loader: BatchLoader | StreamingLoader) -> Ending:
        self._clock.restart()
        self._loader_state = loader.state()
        first_step = self.step + 1
        phases = self._parts.phases
        for step in range(first_step, self._config.num_steps + 1):
            seed_step(self._config.seed, step, self._parts.dp_rank)
            phases.enter(Phase.DATA, step)
            waited_from = time.perf_counter()
            micro_batches = [self._parts.task.make_batch(sequences) for sequences in loader.next_step()]
            data_wait_s = time.perf_counter() - waited_from
            num_targets = sum(self._parts.task.num_targets(batch) for batch in micro_batches)
            phases.enter(Phase.AGREE)
            agreed = agree_on_step(num_targets, self._parts.is_stop_requested())
            if agreed.stop:
                self._save()
                return Ending.STOPPED
            phases.enter(Phase.TRAIN)
            with self._parts.profiler.step():
                record = self._train_step(step, micro_batches, agreed.num_targets)
            # Not before: a step that was taken and then given up for a stop comes again.
            self._loader_state = loader.state()
            self._clock.add_step(agreed.num_targets, data_wait_s)
            if step == first_step:
                self._parts.after_first_step()
            self._after_step(record)
            if step % _GC_EVERY_STEPS == 0:
                gc.collect(1)
        self._save()
        return Ending.FINISHED

    def _train_step(self, step: int, micro_batches: list[Batch], num_targets: int) -> StepRecord:
        engine, optimizer = self._parts.engine, self._config.optimizer
        rate = learning_rate(step, optimizer.lr, self._config.schedule, self._training.schedule_total_steps)
        noise = None
        if self._noise_scale is not None and is_due(step, self._config.metrics.every_steps):
            counts = [self._parts.task.num_targets(batch) for batch in micro_batches]
            loss_sum, noise = train_and_measure(engine, micro_batches, counts, num_targets)
        else:
            loss_sum = engine.train_batch(micro_batches, num_targets)
        grad_norm = engine.clip_grad_norm(optimizer.clip_norm)
        stepped = engine.step(rate)
        self._skipped.add(stepped)
        if self._parts.weight_average is not None:
            self._parts.weight_average.update(stepped)
        self._training = self._training.model_copy(
            update={
                "step": step,
                "num_samples": self._training.num_samples + self._config.batch.global_size,
                "num_tokens": self._training.num_tokens + num_targets,
            }
        )
        return StepRecord(loss_sum, num_targets, grad_norm, rate, engine.loss_scale, noise)

    def _after_step(self, record: StepRecord) -> None:
        step, config = self.step, self._config
        is_last = step == config.num_steps
        evaluates = is_last or is_due(step, config.evaluation.every_steps)
        if evaluates or is_due(step, config.metrics.every_steps):
            self._log(record, evaluates=evaluates)
        elif self._parts.ranks.rank == 0:
            self._parts.observers.advance(step)
        if is_due(step, config.checkpoint.every_steps) and not is_last:
            self._save()

    def _log(self, record: StepRecord, *, evaluates: bool) -> None:
        parts = self._parts
        parts.phases.enter(Phase.LOG)
        metrics, longest_skip = summarize_step(
            record, self._skipped, self._clock, parts.meter, parts.ranks, self._noise_scale
        )
        metrics["train/tokens"] = self._training.num_tokens
        metrics |= self._mfu(metrics)
        if evaluates:
            metrics |= self.evaluate()
        metrics |= self._clock.time_shares(metrics["throughput/data_wait_fraction"] or 0.0)
        if self._metrics_file is not None:
            self._metrics_file.write(self.step, metrics)
            parts.observers.log(self.step, metrics)
        if longest_skip >= self._config.faults.max_nonfinite_steps + self._num_halvings():
            raise NonFiniteFailure(
                f"the loss or a gradient was not finite in {longest_skip} steps in a row before step {self.step + 1} "
                f"(faults.max_nonfinite_steps={self._config.faults.max_nonfinite_steps}), all of them skipped; "
                "lower optimizer.lr, lengthen schedule.warmup_steps or look at the data of these steps."
            )
        self._clock.restart()

    def _num_halvings(self) -> int:
        """Steps that fp16 may skip in a row for good reason: each halves the loss scale, down to 1."""
        if self._parts.engine.loss_scale is None:
            return 0
        return math.ceil(math.log2(self._config.precision.initial_loss_scale))

    def _mfu(self, metrics: Metrics) -> Metrics:
        rate, peak = metrics["throughput/tokens_per_s_per_device"], self._parts.peak_flops
        length = self._config.data.sequence_length
        if peak is None or rate is None:
            return {"throughput/mfu": None, "throughput/mfu_causal": None}
        return {
            "throughput/mfu": rate * self._parts.facts.flops_per_token(length, causal=False) / peak,
            "throughput/mfu_causal": rate * self._parts.facts.flops_per_token(length, causal=True) / peak,
        }

    def evaluate(self) -> Metrics:
        """The task's metrics on the held-out split, and those of the averaged weights as ``eval/ema_...``.

        Every rank must call it. Empty where nothing is held out.
        """
        average = self._parts.weight_average
        with self._parts.phases.during(Phase.EVALUATE), self._clock.paused("evaluation"):
            metrics = self._evaluate_weights()
            if average is not None and metrics:
                with average.in_place_of_weights():
                    averaged = self._evaluate_weights()
                metrics |= {name.replace("eval/", "eval/ema_", 1): value for name, value in averaged.items()}
        return metrics

    def _evaluate_weights(self) -> Metrics:
        parts = self._parts
        sums: torch.Tensor | None = None
        for sequences in parts.evaluation_batches():
            batch_sums = parts.engine.evaluate_batch(parts.task.make_batch(sequences))
            sums = batch_sums if sums is None else sums + batch_sums
        return {} if sums is None else parts.task.evaluation_metrics(sum_over_ranks(sums, parts.ranks))

    def _save(self) -> None:
        self._parts.phases.enter(Phase.SAVE)
        with self._clock.paused("saving"):
            # Waits for the device, as saving does anyway.
            training = self._training.model_copy(
                update={
                    "num_skipped_steps": int(self._skipped.total.item()),
                    "num_skipped_in_a_row": int(self._skipped.in_a_row.item()),
                    "noise_gradient_square": self._noise_scale.gradient_square if self._noise_scale else 0.0,
                    "noise_variance": self._noise_scale.variance if self._noise_scale else 0.0,
                    "trackers": self._parts.observers.tracker_state(),
                    "loader_states": gather_states(self._loader_state, self._parts.ranks),
                }
            )
            folder = self._parts.checkpointer.save(self._parts.engine, training)
        if folder is not None and self._parts.ranks.rank == 0:
            self._parts.observers.message(f"saved {folder}")

    def _initial_state(self) -> TrainingState:
        return TrainingState(
            step=0,
            num_samples=0,
            num_tokens=0,
            num_skipped_steps=0,
            num_skipped_in_a_row=0,
            schedule_total_steps=self._config.schedule.total_steps or self._config.num_steps,
            seed=self._config.seed,
        )


def is_due(step: int, every_steps: int) -> bool:
    """Whether something that happens every so many steps happens after this one; 0 means never."""
    return every_steps > 0 and step % every_steps == 0
