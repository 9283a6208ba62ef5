"""What a run continues from besides tensors."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sharding.strict_model import StrictRecord
from trainer.config.data import SampleRange

Better = Literal["lower", "higher"]
"""Which direction of a metric is better."""


class MonitorState(StrictRecord):
    """How what is monitored has come along, over all evaluations of the run."""

    metric: str = ""
    """Which metric it is, as ``evaluation.monitor`` names it; empty before the first evaluation."""

    better: Better = "lower"
    """Which direction of it is better."""

    best: float | None = None
    """Its best value; None where it was never finite."""

    best_step: int = 0
    """Step with this value."""

    num_not_better: int = 0
    """Evaluations since then."""


SkippedRanges = Annotated[list[Annotated[SampleRange, Field(strict=False)]], Field(strict=False)]


class StageRecord(StrictRecord):
    """What is known of a stage of the run."""

    data_fingerprint: str
    """Identity of its prepared corpus."""

    first_step: int | None = None
    """Finished steps when its corpus was begun; None where it was not yet."""

    skipped_samples: SkippedRanges = []
    """Positions of its corpus that are skipped, while another stage is being trained."""


class TrainingState(StrictRecord):
    """Everything that a run continues from besides tensors.

    Schedules are functions of the step, and random generators are seeded from (seed, step, rank), so neither has a
    state of its own.
    """

    step: int
    """Finished optimizer steps."""

    num_samples: int
    """Samples consumed since the start of the run; those that are skipped do not count."""

    num_tokens: int
    """Valid training targets consumed since the start of the run."""

    num_skipped_steps: int
    """Steps skipped for a non-finite loss or gradient."""

    num_skipped_in_a_row: int
    """Length of the latest unbroken series of skipped steps."""

    schedule_total_steps: int
    """Horizon of the learning-rate schedule in steps."""

    seed: int
    """Seed of parameters, data order and random generators."""

    eval_metrics: dict[str, float] = {}
    """Metrics of the held-out split after this step, those that are finite; empty where it was not evaluated."""

    monitor: MonitorState = MonitorState()
    """The metric that is monitored."""

    noise_gradient_square: float = 0.0
    """Moving average of the squared norm of the true gradient, where the gradient noise scale is measured."""

    noise_variance: float = 0.0
    """Moving average of the variance of one token's gradient, summed over parameters, where it is measured."""

    skipped_samples: SkippedRanges = []
    """Global sample positions that are skipped, by configuration or after a spike, as ranges without their end; counted
    from the beginning of the corpus."""

    # What only some runs have is written down by these alone.
    first_sample: int = Field(default=0, exclude_if=lambda value: not value)
    """Samples consumed when the present corpus was begun, by a stage or by a fork onto another one: its position 0."""

    stage_total_steps: int = Field(default=0, exclude_if=lambda value: not value)
    """Horizon in steps of the schedule that the present stage has for itself; 0 where it has none."""

    stages: dict[str, StageRecord] = Field(default={}, exclude_if=lambda value: not value)
    """The stages of the run by name; empty in a run without."""

    num_rollbacks: int = 0
    """Times that the run returned to a checkpoint because of a spike."""

    recent_losses: list[float] = []
    """Losses of the latest steps that were finite, oldest first, which the next ones are compared with."""

    recent_grad_norms: list[float] = []
    """Gradient norms of the same steps."""

    trackers: dict[str, Any] = {}
    """Identities of the tracker runs."""

    loader_states: list[dict[str, Any]] = []
    """Place of each data-parallel rank in a streamed source; empty where the corpus is prepared."""

    @model_validator(mode="before")
    @classmethod
    def _with_metrics(cls, values: Any) -> Any:
        """Earlier releases knew of the loss alone."""
        if not isinstance(values, dict) or "eval_loss" not in values:
            return values
        loss = values["eval_loss"]
        rest = {name: value for name, value in values.items() if name != "eval_loss"}
        return {"eval_metrics": {} if loss is None else {"loss": loss}} | rest

    @property
    def num_corpus_samples(self) -> int:
        """Samples consumed of the present corpus."""
        return self.num_samples - self.first_sample

    @property
    def eval_loss(self) -> float | None:
        """Held-out loss after this step; None where it was not evaluated, or the loss is not finite."""
        return self.eval_metrics.get("loss")
