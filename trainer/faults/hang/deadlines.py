"""How long a rank may stay in a phase: learnt from the run itself, and when a rank that stays longer is a hang."""

from collections import deque
from collections.abc import Iterable
from statistics import median

from trainer.faults.hang.heartbeat import Heartbeat
from trainer.runtime.phases import Phase, PhaseState

_NUM_REMEMBERED = 64
# What happened once may take longer when it happens again, and the first step has compilation in it.
_TIMES_LONGEST = 2.0
# Storage may be slow once in a while, for minutes: here the run's own history is no guide.
_UNSTEADY = frozenset({Phase.BUILD, Phase.LOAD, Phase.SAVE, Phase.FINISH})
_ORDER = {phase: index for index, phase in enumerate(Phase)}


class Deadlines:
    """The allowance of each phase in seconds: ``max(min_s, factor x median, 2 x longest)`` of its latest 64 durations.

    A phase that has not ended once in this attempt, and with it everything up to the end of the first step, has
    ``startup_s``. So have phases that depend on storage, at the least.
    """

    def __init__(self, *, factor: float, min_s: float, startup_s: float) -> None:
        """Nothing is known yet.

        Args:
            factor: how many times longer than usual a phase may be.
            min_s: what a phase may take in any case, in seconds.
            startup_s: what it may take before there is a history, in seconds.
        """
        self._factor = factor
        self._min_s = min_s
        self._startup_s = max(startup_s, min_s)
        self._durations: dict[Phase, deque[float]] = {phase: deque(maxlen=_NUM_REMEMBERED) for phase in Phase}
        self._first_train_s: float | None = None

    def listen(self, ended: PhaseState, begun: PhaseState) -> None:
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
        longest_s = max(durations)
        if phase is Phase.TRAIN and self._first_train_s is not None:
            longest_s = max(longest_s, self._first_train_s)
        learnt_s = max(self._min_s, self._factor * median(durations), _TIMES_LONGEST * longest_s)
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
    return is_overdue(own) and not any(_may_take_longer(other, unchanged_s, own) for other, unchanged_s in others)


def _may_take_longer(other: Heartbeat, unchanged_s: float, own: Heartbeat) -> bool:
    """Whether a rank is behind this one, and in time."""
    if other.state != "running" or position(other) >= position(own):
        return False
    # No rank leaves the agreement of a step before all have come to it.
    agreed_step = own.step if _ORDER[own.phase] > _ORDER[Phase.AGREE] else own.step - 1
    if position(other) < (agreed_step, _ORDER[Phase.AGREE]):
        # It has left the phase of its last heartbeat, and said nothing since: what it was allowed there is void.
        return unchanged_s <= own.allowance_s
    return not is_overdue(other, unchanged_s)
