"""What the Trainer's loop works with on one rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sharding.engine import Engine
from sharding.mesh import ParallelMesh
from sharding.ranks.process_group import Ranks
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.stage_state import after_boundary
from trainer.checkpoint.training_state import TrainingState
from trainer.config.stages import describe_stage, stage_of_step
from trainer.metrics.best import record_directions
from trainer.metrics.profiling import StepProfiler
from trainer.metrics.stragglers import BusyMeter
from trainer.metrics.system_metrics import SystemMeter
from trainer.model.models import ModelFacts
from trainer.optimizers.pruning import Pruning
from trainer.optimizers.weight_average import WeightAverage
from trainer.runtime.phases import Phases
from trainer.stages import StageParts
from trainer.tasks.evaluation import Evaluation
from trainer.tasks.task import ClassTable, Metric, Task
from trainer.trackers.observers import Observers


@dataclass(frozen=True)
class TrainerParts:
    """What the loop works with; built in ``trainer.build``.

    Attributes:
        engine: the sharded model and optimizer.
        task: batches and metrics.
        ranks: this rank's place.
        mesh: the ranks, and the roles of this one.
        stages: what belongs to each stage, in order.
        evaluation: judges the weights by the held-out split.
        checkpointer: saving and resuming.
        observers: console, trackers; silent on all ranks but the first.
        phases: what this rank is doing; the loop tells it.
        is_stop_requested: whether this rank was asked to stop.
        compare_replicas: called with a step; raises where ranks hold different parameters, if that is looked for.
        after_first_step: called once; lowers the collectives' time limit.
        facts: size of the model.
        description: the model, ranks, strategy and precision in one line.
        profiler: records the steps that were asked for.
        busy: seconds of a step that this rank did not wait for others.
        meter: use of nodes and GPUs, in percent.
        pruning: keeps pruned weights at zero, where there are some.
        peak_flops: dense peak of one device in FLOP/s, where known.
        weight_average: moving average of the weights, where one is kept.
    """

    engine: Engine
    task: Task
    ranks: Ranks
    mesh: ParallelMesh
    stages: Sequence[StageParts]
    evaluation: Evaluation
    checkpointer: Checkpointer
    observers: Observers
    phases: Phases
    is_stop_requested: Callable[[], bool]
    compare_replicas: Callable[[int], None]
    after_first_step: Callable[[], None]
    profiler: StepProfiler
    meter: SystemMeter
    facts: ModelFacts
    description: str
    busy: BusyMeter
    peak_flops: float | None
    pruning: Pruning
    weight_average: WeightAverage | None = None

    @property
    def fingerprints(self) -> dict[str, str]:
        """Identities of the corpora of all stages, by name."""
        return {parts.stage.name: parts.fingerprint for parts in self.stages}

    def stage_of(self, step: int) -> StageParts:
        """What belongs to the stage of a step, counted from 1."""
        return self.stages[stage_of_step([parts.stage for parts in self.stages], step).index]

    def after_update(self, step: int, stepped: torch.Tensor) -> None:
        """What follows an optimizer step; ``stepped`` is 1.0 where it has changed the weights. Every rank must call it.

        Raises:
            AgreedError: see ``Pruning.after_step``.
        """
        # Before the average takes in weights that are to be zero.
        self.pruning.after_step(step)
        if self.weight_average is not None:
            self.weight_average.update(stepped)

    def begin_next(self, ended: StageParts, training: TrainingState) -> tuple[StageParts, TrainingState]:
        """What belongs to the stage after one that has ended, and the state in which it begins."""
        parts = self.stages[ended.stage.index + 1]
        stage = parts.stage
        training = after_boundary(training, ended.stage, stage)
        parts.spike_policy.restore(training)
        self.observers.info(describe_stage(stage, len(self.stages)))
        self.observers.event("stage", training.step, name=stage.name, steps=stage.config.num_steps)
        if stage.config.compile.enabled:
            # A run that is continued in the stage compiles for its shapes alone, and so must this one.
            torch.compiler.reset()
        return parts, training

    def evaluate_weights(self, stage: StageParts) -> tuple[dict[str, Metric], ClassTable | None]:
        """Metrics on a stage's held-out split and on other sets, and scores of each class on the split."""
        of_split = self.evaluation.evaluate(stage.evaluation_batches())
        metrics = {} if of_split is None else dict(of_split.metrics)
        for name, batches in stage.evaluation_sets.items():
            metrics |= {f"{name}/{key}": metric for key, metric in self.evaluation.metrics(batches()).items()}
        if self.observers.is_watched:
            record_directions(
                self.observers.metrics_path.parent, {name: metric.better for name, metric in metrics.items()}
            )
        return metrics, None if of_split is None else of_split.class_table
