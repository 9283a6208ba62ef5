"""RunConfig: one strict, frozen description of a run. Knows no rule that spans settings."""

from pathlib import Path

from pydantic import Field

from sharding.config import ActivationCheckpointingConfig, CompileConfig, ParallelConfig, PrecisionConfig
from sharding.strict_model import StrictModel
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.data import DataConfig
from trainer.config.faults import FaultsConfig
from trainer.config.optimizer import OptimizerConfig
from trainer.config.schedule import ScheduleConfig
from trainer.config.sections import BatchConfig, EvaluationConfig, LaunchConfig, MetricsConfig, ModelConfig, TaskConfig
from trainer.config.tracking import TrackingConfig


class RunConfig(StrictModel):
    """Everything that describes a run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder under output_dir; letters, digits, `.`, `_` and `-`."""

    seed: int = Field(default=1234, ge=0, lt=2**63)
    """Seed of initial parameters, data order and dropout."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps after which the run is finished; either this or tokens must be set."""

    tokens: int | None = Field(default=None, ge=1)
    """Tokens, global_size x sequence_length of them a step, after which the run is finished; the last step is whole."""

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

    parallel: ParallelConfig = ParallelConfig()
    """How state and batch are divided over ranks."""

    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""

    compile: CompileConfig = CompileConfig()
    """Compilation of blocks."""

    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    """Recomputed activations."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out loss."""

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
        """Token positions in one optimizer step, padding and other positions without a target included."""
        return self.batch.global_size * self.data.sequence_length

    @property
    def num_steps(self) -> int:
        """Optimizer steps after which the run is finished: ``steps``, or as many as ``tokens`` need."""
        if self.steps is not None:
            return self.steps
        return -(-(self.tokens or 0) // self.tokens_per_step)
