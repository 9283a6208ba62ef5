"""Ranks that are slow but alive: each rank's own time in a step, measured where it cannot be waiting for another."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from sharding.config import Strategy
from trainer.runtime.phases import Phase, Phases, PhaseState

# Once may be chance: another job, a page cache.
NUM_INTERVALS = 3
# Their forward pass has no collective, where those that shard parameters gather them and all ranks become equally slow.
_LOCAL_FORWARD: frozenset[Strategy] = frozenset({"none", "ddp"})


class BusyMeter:
    """Seconds of the steps since the last reading that this rank worked by itself.

    They are the phase ``data``, and ``train`` up to its first collective: to the end of the first forward pass where
    that has none, else to its beginning. What comes later is as long on every rank, since each waits for the slowest.
    On a GPU this is the host's time.
    """

    def __init__(self, phases: Phases, strategy: Strategy) -> None:
        """Measure from now on."""
        self._clock = phases.clock
        self._has_local_forward = strategy in _LOCAL_FORWARD
        self._train_began: float | None = None
        self._busy_s = 0.0
        phases.listen(self._listen)

    def timed(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """The same forward pass and loss, of which the first in each step is measured."""

        def measured(*arguments: Any, **options: Any) -> Any:
            if self._has_local_forward:
                result = loss(*arguments, **options)
                self._end()
                return result
            self._end()
            return loss(*arguments, **options)

        return measured

    def take_s(self) -> float:
        """Seconds since the last call."""
        busy_s, self._busy_s = self._busy_s, 0.0
        return busy_s

    def _listen(self, ended: PhaseState, begun: PhaseState) -> None:
        if ended.phase is Phase.DATA:
            self._busy_s += begun.since - ended.since
        self._train_began = begun.since if begun.phase is Phase.TRAIN else None

    def _end(self) -> None:
        if self._train_began is not None:
            self._busy_s += self._clock() - self._train_began
            self._train_began = None


def slowest_rank(busy_s: Sequence[float], elapsed_s: float) -> tuple[int, float]:
    """The rank that works longest by itself, and how many times longer it makes the steps.

    Args:
        busy_s: each rank's seconds.
        elapsed_s: seconds of these steps, the same for all ranks.

    Returns:
        The rank, and ``elapsed_s`` over what it would be if that rank were like the median.
    """
    slowest = max(range(len(busy_s)), key=busy_s.__getitem__)
    excess_s = busy_s[slowest] - statistics.median_low(busy_s)
    return slowest, elapsed_s / max(elapsed_s - excess_s, 1e-3 * elapsed_s)


class StragglerWatch:
    """Names a rank that is slow for several log intervals in a row, once each time that it becomes so."""

    def __init__(self, ratio: float) -> None:
        """Name ranks that make steps this many times longer; 0 names none."""
        self._ratio = ratio
        self._rank: int | None = None
        self._num_intervals = 0

    def see(self, rank: int, ratio: float) -> bool:
        """Take in one log interval; returns whether its slowest rank is to be named now."""
        if not self._ratio or ratio < self._ratio:
            self._rank, self._num_intervals = None, 0
            return False
        self._num_intervals = self._num_intervals + 1 if rank == self._rank else 1
        self._rank = rank
        return self._num_intervals == NUM_INTERVALS
