"""What the Trainer's loop works with on one rank."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from sharding.engine import Engine
from sharding.mesh import ParallelMesh
from sharding.ranks.process_group import Ranks
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.training_state import TrainingState
from trainer.data.loader import BatchLoader
from trainer.data.samples import MicroBatch
from trainer.data.streaming import StreamingLoader
from trainer.metrics.best import record_directions
from trainer.metrics.profiling import StepProfiler
from trainer.metrics.stragglers import BusyMeter
from trainer.metrics.system_metrics import SystemMeter
from trainer.model.models import ModelFacts
from trainer.numerics.spike_policy import SpikePolicy
from trainer.optimizers.weight_average import WeightAverage
from trainer.runtime.phases import Phases
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
        build_loader: a loader that starts where the training is.
        evaluation: judges the weights by the held-out split.
        evaluation_batches: this rank's share of the held-out samples, as micro-batches; equally many on every rank.
        evaluation_sets: the same of what else is evaluated, by name.
        checkpointer: saving and resuming.
        observers: console, trackers; silent on all ranks but the first.
        spike_policy: judges each step's loss and gradient norm.
        phases: what this rank is doing; the loop tells it.
        is_stop_requested: whether this rank was asked to stop.
        compare_replicas: called with a step; raises where ranks hold different parameters, if that is looked for.
        after_first_step: called once; lowers the collectives' time limit.
        facts: size of the model.
        description: the model, ranks, strategy and precision in one line.
        profiler: records the steps that were asked for.
        busy: seconds of a step that this rank did not wait for others.
        meter: use of nodes and GPUs, in percent.
        peak_flops: dense peak of one device in FLOP/s, where known.
        weight_average: moving average of the weights, where one is kept.
    """

    engine: Engine
    task: Task
    ranks: Ranks
    mesh: ParallelMesh
    build_loader: Callable[[TrainingState], BatchLoader | StreamingLoader]
    evaluation: Evaluation
    evaluation_batches: Callable[[], Iterable[MicroBatch]]
    evaluation_sets: Mapping[str, Callable[[], Iterable[MicroBatch]]]
    checkpointer: Checkpointer
    observers: Observers
    spike_policy: SpikePolicy
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
    weight_average: WeightAverage | None = None

    def evaluate_weights(self) -> tuple[dict[str, Metric], ClassTable | None]:
        """Metrics on the held-out split and on other sets, and scores of each class on the split."""
        of_split = self.evaluation.evaluate(self.evaluation_batches())
        metrics = {} if of_split is None else dict(of_split.metrics)
        for name, batches in self.evaluation_sets.items():
            metrics |= {f"{name}/{key}": metric for key, metric in self.evaluation.metrics(batches()).items()}
        if self.observers.is_watched:
            record_directions(
                self.observers.metrics_path.parent, {name: metric.better for name, metric in metrics.items()}
            )
        return metrics, None if of_split is None else of_split.class_table
