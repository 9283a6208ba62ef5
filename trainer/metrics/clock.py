"""Throughput: tokens and the time that training them took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from trainer.metrics.file import Metrics


@dataclass
class ThroughputClock:
    """Time and tokens since the last log line; evaluation and saving do not count.

    Tokens are the positions that the model computes on, with or without a target: these cost the time.

    ``take_busy_s`` gives the time that this rank worked by itself.
    """

    num_tokens: int = 0
    num_steps: int = 0
    data_wait_s: float = 0.0
    take_busy_s: Callable[[], float] = lambda: 0.0
    _paused_s: dict[str, float] = field(default_factory=dict)
    _started_at: float = field(default_factory=time.perf_counter)

    def add_step(self, num_tokens: int, data_wait_s: float) -> None:
        """Count one step's tokens and the time it waited for data, in seconds."""
        self.num_tokens += num_tokens
        self.num_steps += 1
        self.data_wait_s += data_wait_s

    @contextmanager
    def paused(self, work: str) -> Iterator[None]:
        """Leave the time spent inside out of the account; ``work`` names what it is spent on."""
        started_at = time.perf_counter()
        try:
            yield
        finally:
            self._paused_s[work] = self._paused_s.get(work, 0.0) + time.perf_counter() - started_at

    def elapsed_s(self) -> float:
        """Seconds of training since the last restart."""
        return max(time.perf_counter() - self._started_at - sum(self._paused_s.values()), 1e-9)

    def paused_s(self, work: str) -> float:
        """Seconds spent on ``work`` since the last restart."""
        return self._paused_s.get(work, 0.0)

    def time_shares(self, data_wait_fraction: float) -> Metrics:
        """What wall time since the last restart was spent on, in shares that add up to 1.

        Args:
            data_wait_fraction: share of training time in which the ranks waited for data.
        """
        training_s = self.elapsed_s()
        total_s = training_s + sum(self._paused_s.values())
        return {
            "time/training_fraction": training_s * (1.0 - data_wait_fraction) / total_s,
            "time/data_wait_fraction": training_s * data_wait_fraction / total_s,
            "time/evaluation_fraction": self.paused_s("evaluation") / total_s,
            "time/saving_fraction": self.paused_s("saving") / total_s,
        }

    def restart(self) -> None:
        """Begin a new interval."""
        self.num_tokens = self.num_steps = 0
        self.data_wait_s = 0.0
        self._paused_s = {}
        self._started_at = time.perf_counter()
