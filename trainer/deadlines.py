"""How long a rank may stay in a phase: learnt from the run itself, and when a rank that stays longer is a hang."""

from collections import deque
from collections.abc import Iterable

from trainer.heartbeat import Heartbeat
from trainer.phases import Moment, Phase

_NUM_REMEMBERED = 64
# Compilation may come again for another shape; it takes no longer than the first one did.
_COMPILED_AGAIN = 2.0
# Storage may be slow once in a while, for minutes: here the run's own history is no guide.
_UNSTEADY = frozenset({Phase.BUILD, Phase.LOAD, Phase.SAVE, Phase.FINISH})
_ORDER = {phase: index for index, phase in enumerate(Phase)}


class Deadlines:
    """The allowance of each phase in seconds: ``max(min_s, factor x the longest of its latest 64 durations)``.

    A phase that has not ended once in this attempt, and with it everything up to the end of the first step, has
    ``startup_s``. So have phases that depend on storage, at the least.
    """

    def __init__(self, *, factor: float, min_s: float, startup_s: float) -> None:
        """Nothing is known yet.

        Args:
            factor: how many times longer than its longest a phase may be.
            min_s: what a phase may take in any case, in seconds.
            startup_s: what it may take before there is a history, in seconds.
        """
        self._factor = factor
        self._min_s = min_s
        self._startup_s = max(startup_s, min_s)
        self._durations: dict[Phase, deque[float]] = {phase: deque(maxlen=_NUM_REMEMBERED) for phase in Phase}
        self._first_train_s: float | None = None

    def listen(self, ended: Moment, begun: Moment) -> None:
        """Remember how long a phase took; a listener of ``Phases``."""
        seconds = begun.since - ended.since
        if self._first_train_s is None:
            if ended.phase is not Phase.TRAIN:
                return
            self._first_train_s = seconds
        self._durations[ended.phase].append(seconds)

    def allowance_s(self, phase: Phase) -> float:
        """How long a phase may last, in seconds; may be asked from any thread."""
        # A copy in one operation: the rank's own thread appends meanwhile.
        durations = list(self._durations[phase])
        if not durations:
            return self._startup_s
        learnt_s = max(self._min_s, self._factor * max(durations))
        if phase is Phase.TRAIN and self._first_train_s is not None:
            learnt_s = max(learnt_s, _COMPILED_AGAIN * self._first_train_s)
        return max(learnt_s, self._startup_s) if phase in _UNSTEADY else learnt_s


def position(heartbeat: Heartbeat) -> tuple[int, int]:
    """A rank's place in the run, as something that can be compared with another's."""
    return heartbeat.step, _ORDER[heartbeat.phase]


def is_overdue(heartbeat: Heartbeat, unchanged_s: float = 0.0) -> bool:
    """Whether a rank has stayed in its phase for too long.

    Args:
        heartbeat: its last.
        unchanged_s: seconds since then.
    """
    return heartbeat.in_phase_s + unchanged_s > heartbeat.allowance_s


def is_hang(own: Heartbeat, others: Iterable[tuple[Heartbeat, float]]) -> bool:
    """Whether this rank sees a hang: it is overdue, and whoever is behind it, whom it waits for, is overdue as well.

    Args:
        own: this rank's heartbeat.
        others: the other ranks' last, each with the seconds for which it has not changed.
    """
    behind = [(other, unchanged_s) for other, unchanged_s in others if position(other) < position(own)]
    return is_overdue(own) and all(
        other.state != "running" or is_overdue(other, unchanged_s) for other, unchanged_s in behind
    )
