"""Throughput: tokens and the time that training them took."""

from collections.abc import Callable

from trainer.metrics.file import Metrics
from trainer.metrics.goodput import CATEGORY_OF, Category
from trainer.runtime.phases import Phases


class ThroughputClock:
    """Tokens since the last log line, and the time of the phases since then; evaluation and saving do not count.

    Attributes:
        num_tokens: positions that the model computed on, with or without a target: these cost the time.
        num_steps: optimizer steps.
        take_busy_s: gives the seconds that this rank worked by itself since the last call.
    """

    def __init__(self, phases: Phases, take_busy_s: Callable[[], float] = lambda: 0.0) -> None:
        """Begin an interval of the time that the phases measure."""
        self._phases = phases
        self.take_busy_s = take_busy_s
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self.num_tokens = self.num_steps = 0
        self._spent_before_s = self._phases.spent_s()

    def add_step(self, num_tokens: int) -> None:
        """Count one step and its tokens."""
        self.num_tokens += num_tokens
        self.num_steps += 1

    def elapsed_s(self) -> float:
        """Seconds of training since the last restart, waiting for data included."""
        spent_s = self._spent_s()
        return max(sum(spent_s.values()) - spent_s[Category.EVALUATION] - spent_s[Category.CHECKPOINT], 1e-9)

    def spent_s(self, category: Category) -> float:
        """Seconds that were spent on something since the last restart."""
        return self._spent_s()[category]

    def time_shares(self, data_wait_fraction: float) -> Metrics:
        """What wall time since the last restart was spent on, in shares that add up to 1.

        Args:
            data_wait_fraction: share of training time in which the ranks waited for data.
        """
        training_s, spent_s = self.elapsed_s(), self._spent_s()
        total_s = training_s + spent_s[Category.EVALUATION] + spent_s[Category.CHECKPOINT]
        return {
            "time/training_fraction": training_s * (1.0 - data_wait_fraction) / total_s,
            "time/data_wait_fraction": training_s * data_wait_fraction / total_s,
            "time/evaluation_fraction": spent_s[Category.EVALUATION] / total_s,
            "time/saving_fraction": spent_s[Category.CHECKPOINT] / total_s,
        }

    def _spent_s(self) -> dict[Category, float]:
        spent_s = dict.fromkeys(Category, 0.0)
        for phase, seconds in self._phases.spent_s().items():
            spent_s[CATEGORY_OF.get(phase, Category.OTHER)] += seconds - self._spent_before_s[phase]
        return spent_s
