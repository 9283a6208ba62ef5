"""RunConfig: one strict, frozen description of a run. Knows no rule that spans settings."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from pydantic import Field

from sharding.config import ActivationCheckpointingConfig, CompileConfig, ParallelConfig, PrecisionConfig
from sharding.strict_model import SET, OnlyWith, StrictModel
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.data import DataConfig
from trainer.config.distill import DistillConfig
from trainer.config.faults import FaultsConfig
from trainer.config.optimizer import OptimizerConfig
from trainer.config.prune import PruneConfig
from trainer.config.schedule import ScheduleConfig
from trainer.config.sections import BatchConfig, EvaluationConfig, LaunchConfig, MetricsConfig, ModelConfig, TaskConfig
from trainer.config.stage_section import StageConfig
from trainer.config.tracking import TrackingConfig

OWN_MODULES = (("task", "name"), ("model", "factory"), ("data", "factory"))
"""Sections and settings in them that may name a module of the user's own, which lies in the section's ``folder``."""


class RunConfig(StrictModel):
    """Everything that describes a run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder under output_dir; letters, digits, `.`, `_` and `-`."""

    seed: int = Field(default=1234, ge=0, lt=2**63)
    """Seed of initial parameters, data order and dropout."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps after which the run is finished; exactly one of this, tokens, epochs and stages must be set."""

    tokens: int | None = Field(default=None, ge=1)
    """Tokens, global_size x sequence_length of them a step, after which the run is finished; the last step is whole."""

    epochs: Annotated[
        float | None, OnlyWith({"data.streaming": False}, because="a stream's samples are not counted beforehand")
    ] = Field(default=None, gt=0.0)
    """Passes through the training split, also of a fraction, after which the run is finished; the last step is whole,
    and a step may straddle two epochs."""

    epoch_samples: Annotated[int | None, OnlyWith(epochs=SET)] = Field(default=None, ge=1)
    """Samples of an epoch; a run counts them once its corpus is prepared and writes them down here."""

    deterministic: bool = False
    """Use only deterministic kernels, so that a GPU run repeats bit for bit; CPU runs always do."""

    output_dir: str = "runs"
    """Folder that run folders are created in."""

    task: TaskConfig = TaskConfig()
    """What the model is trained to do."""

    model: ModelConfig
    """Which model is trained."""

    data: DataConfig = DataConfig()
    """Corpus and samples."""

    batch: BatchConfig = BatchConfig()
    """Samples per step."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and clipping."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule."""

    prune: PruneConfig = PruneConfig()
    """Pruned weights."""

    distill: DistillConfig = DistillConfig()
    """A teacher to learn from."""

    stages: Annotated[tuple[StageConfig, ...], Field(strict=False)] = ()
    """Parts of the run, one after another, each with data, schedule and batch of its own; the optimizer and all
    counters go on."""

    parallel: ParallelConfig = ParallelConfig()
    """How state and batch are divided over ranks."""

    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""

    compile: CompileConfig = CompileConfig()
    """Compilation of blocks."""

    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    """Recomputed activations."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out metrics."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and continuing."""

    metrics: MetricsConfig = MetricsConfig()
    """Measurements."""

    tracking: TrackingConfig = TrackingConfig()
    """Trackers."""

    launch: LaunchConfig = LaunchConfig()
    """How ranks are started."""

    faults: FaultsConfig = FaultsConfig()
    """Reaction to faults."""

    @property
    def run_dir(self) -> Path:
        """The run's folder, ``output_dir/name``."""
        return Path(self.output_dir) / self.name

    @property
    def tokens_per_step(self) -> int:
        """Token positions in one optimizer step, padding and other positions without a target included.

        Of rows that are texts at most so many; of other rows the samples.
        """
        return self.batch.global_size * (self.data.sequence_length if self.data.unit == "tokens" else 1)

    @property
    def compiles_loss(self) -> bool:
        """Whether the loss is compiled with the blocks; not where a teacher is compared with by its logits."""
        return self.compile.enabled and self.distill.teacher is None

    @property
    def is_length_known(self) -> bool:
        """Whether ``num_steps`` can be told: epochs have no number of steps before the corpus is prepared."""
        return self.epochs is None or self.epoch_samples is not None

    @property
    def num_steps(self) -> int:
        """Optimizer steps after which the run is finished: ``steps``, or as ``tokens``, ``epochs`` or stages need.

        Those of ``epochs`` are known once ``trainer.data.epochs`` has counted the samples.
        """
        if self.stages:
            return sum(stage.num_steps(self.batch, self.data) for stage in self.stages)
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            assert self.epoch_samples is not None, "epochs are counted once the corpus is prepared"
            # As it was written: 1.1 is a little more as a binary fraction, which could make a step of its own.
            return math.ceil(Fraction(str(self.epochs)) * self.epoch_samples / self.batch.global_size)
        return -(-(self.tokens or 0) // self.tokens_per_step)
