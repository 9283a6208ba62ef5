"""What a run continues from besides tensors."""

from typing import Annotated, Any

from pydantic import Field

from sharding.strict_model import StrictRecord
from trainer.config.data import SampleRange


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

    eval_loss: float | None = None
    """Held-out loss after this step; None where it was not evaluated, or the loss is not finite."""

    noise_gradient_square: float = 0.0
    """Moving average of the squared norm of the true gradient, where the gradient noise scale is measured."""

    noise_variance: float = 0.0
    """Moving average of the variance of one token's gradient, summed over parameters, where it is measured."""

    skipped_samples: Annotated[list[Annotated[SampleRange, Field(strict=False)]], Field(strict=False)] = []
    """Global sample positions that are skipped, by configuration or after a spike, as ranges without their end."""

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
