"""What an attempt spends its time on, as rank 0's phases tell it; kept in ``logs/attempt-N/goodput.json``."""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from trainer.files.atomic_files import write_atomically
from trainer.metrics.goodput import (
    CATEGORY_OF,
    GOODPUT_NAME,
    LOOP_CATEGORIES,
    AttemptLedger,
    Category,
    Mark,
    account,
    read_ledgers,
    spent_until,
    summarize,
)
from trainer.run_folder.events import read_events
from trainer.runtime.phases import Phase, Phases, PhaseState

_PLACE_OF = {phase: LOOP_CATEGORIES.index(CATEGORY_OF.get(phase, Category.OTHER)) for phase in Phase}
_TRAINING = LOOP_CATEGORIES.index(Category.TRAINING)
_WRITE_EVERY_S = 1.0
# Writing takes at most one part in so many of the time; a slow file system gets fewer writes.
_WRITE_SHARE = 1000
_MAX_MARKS = 256
# Set by a job that submits another in its place.
SUCCESSOR_VARIABLE = "SHARDLINE_IS_SUCCESSOR"


def begin_ledger(log_dir: Path, attempt: int, began_at: float, *, by_hand: bool = False) -> None:
    """Note when an attempt began, and by whom; called before its ranks are started, where a launcher does that.

    Raises:
        OSError: the file cannot be written.
    """
    _write(log_dir / GOODPUT_NAME, AttemptLedger(attempt=attempt, began_at=began_at, began_by_hand=by_hand))


def begins_by_hand(run_dir: Path, attempt: int, environment: Mapping[str, str]) -> bool:
    """Whether a person begins an attempt: neither the run, after one that failed, nor Slurm, which starts a job again.

    Args:
        run_dir: the run's folder.
        attempt: number of the attempt that begins.
        environment: of a Slurm job, where there is one.
    """
    if environment.get("SLURM_RESTART_COUNT", "0") != "0" or SUCCESSOR_VARIABLE in environment:
        return False
    restarts = (event.get("attempt") for event in read_events(run_dir) if event.get("kind") == "restart")
    return attempt - 1 not in restarts


class GoodputLedger:
    """Adds up rank 0's phases; costs about a microsecond for each.

    A process that is killed loses what it spent since the last write, which then counts as time between attempts.
    """

    def __init__(
        self,
        run_dir: Path,
        attempt: int,
        phases: Phases,
        wall_clock: Callable[[], float] = time.time,
        process_age_s: float = 0.0,
    ) -> None:
        """Go on from where the attempt began, and listen to the phases.

        Args:
            run_dir: the run's folder, in which the attempt was begun.
            attempt: its number.
            phases: of rank 0; until the first batch, all is start-up.
            wall_clock: compared with when the attempt began, and with nothing after that.
            process_age_s: for how long this process has been there; its ranks may have been started anew within the
                attempt.
        """
        self._clock = phases.clock
        self._phase, self._since = phases.now.phase, phases.clock()
        self._earlier = [ledger for ledger in read_ledgers(run_dir) if ledger.attempt < attempt]
        self._path, begun = _own_file(run_dir / "logs" / f"attempt-{attempt}")
        self._attempt = attempt
        now = wall_clock()
        self._began_at = now - process_age_s if begun is None else begun.began_at
        self._began_by_hand = begun is not None and begun.began_by_hand
        self._startup_s = max(0.0, now - self._began_at)
        self._finish_s = self._lost_s = self._first_step_s = 0.0
        self._loop_s = [0.0] * len(LOOP_CATEGORIES)
        self._later_steps_s, self._num_later_steps = 0.0, 0
        self._first_step: int | None = None
        self._is_in_first_step = self._is_first_step_lost = False
        self._began_after, self._last_step, self._num_lost_steps = 0, 0, 0
        self._marks: list[Mark] = []
        # Where the present step began, to which a step that is taken again goes back.
        self._step_began = (0, self._loop_s)
        self._is_finishing = False
        self._earlier_s: tuple[int | None, float, float] | None = None
        self._next_write_at = 0.0
        phases.listen(self._hear)
        self.write()

    @property
    def snapshot(self) -> AttemptLedger:
        """The ledger as it stands, the present phase included."""
        startup_s, finish_s, first_step_s, loop_s = self._startup_s, self._finish_s, self._first_step_s, self._loop_s
        place, spent_s = _PLACE_OF[self._phase], max(0.0, self._clock() - self._since)
        if self._first_step is None:
            startup_s += spent_s
        elif self._is_finishing:
            finish_s += spent_s
        elif self._is_in_first_step and place == _TRAINING:
            first_step_s += spent_s
        else:
            loop_s = list(loop_s)
            loop_s[place] += spent_s
        has_begun = self._first_step is not None
        return AttemptLedger(
            attempt=self._attempt,
            began_at=self._began_at,
            began_by_hand=self._began_by_hand,
            startup_s=startup_s,
            first_step_s=first_step_s,
            is_first_step_lost=self._is_first_step_lost,
            typical_step_s=self._later_steps_s / self._num_later_steps if self._num_later_steps else None,
            loop_s=loop_s,
            lost_s=self._lost_s,
            num_lost_steps=self._num_lost_steps,
            finish_s=finish_s,
            began_after=self._began_after if has_begun else None,
            last_step=self._last_step if has_begun else None,
            marks=self._marks,
        )

    def fraction(self) -> float:
        """Share of training in the run's wall time so far, over all attempts; asked at each log line."""
        own = self.snapshot
        if self._earlier_s is None or self._earlier_s[0] != own.began_after:
            # Earlier attempts change no more; what remains of them depends on where this one began.
            nothing = AttemptLedger(
                attempt=self._attempt,
                began_at=self._began_at,
                began_by_hand=self._began_by_hand,
                began_after=own.began_after,
            )
            before = summarize([*self._earlier, nothing])
            assert before is not None, "one ledger at least"
            self._earlier_s = own.began_after, before.seconds[Category.TRAINING], before.wall_s
        seconds, _ = account(own, None, None)
        wall_s = self._earlier_s[2] + own.duration_s
        return (self._earlier_s[1] + seconds[Category.TRAINING]) / wall_s if wall_s > 0 else 0.0

    def sentence(self) -> str:
        """The run's goodput so far, in a line for a person."""
        goodput = summarize([*self._earlier, self.snapshot])
        return goodput.sentence() if goodput is not None else ""

    def write(self) -> None:
        """Write the ledger; any thread may. A disk that is full or away is not what a run ends of."""
        began = self._clock()
        with contextlib.suppress(OSError):
            _write(self._path, self.snapshot)
        ended = self._clock()
        self._next_write_at = ended + max(_WRITE_EVERY_S, _WRITE_SHARE * (ended - began))

    def finish(self) -> None:
        """The loop is over, also where it failed: what comes now is spent on no step."""
        if not self._is_finishing:
            now = self._clock()
            self._hear(
                PhaseState(self._phase, self._last_step, self._since), PhaseState(Phase.FINISH, self._last_step, now)
            )

    def _hear(self, ended: PhaseState, begun: PhaseState) -> None:
        spent_s = begun.since - self._since
        self._phase, self._since = begun.phase, begun.since
        place = _PLACE_OF[ended.phase]
        if self._first_step is None:
            self._startup_s += spent_s
        elif self._is_finishing:
            self._finish_s += spent_s
        else:
            if place != _TRAINING:
                self._loop_s[place] += spent_s
            elif self._is_in_first_step:
                self._first_step_s += spent_s
            else:
                self._loop_s[_TRAINING] += spent_s
                self._later_steps_s += spent_s
            if ended.phase is Phase.TRAIN and begun.phase is not Phase.FINISH:
                self._num_later_steps += not self._is_in_first_step
                self._is_in_first_step = False
                self._last_step = ended.step
        if begun.phase is Phase.DATA:
            self._begin_step(begun.step)
        elif begun.phase is Phase.FINISH:
            self._is_finishing = True
        if ended.phase is Phase.SAVE:
            self._mark()
            self.write()
        elif ended.phase is Phase.LOG and begun.since >= self._next_write_at:
            self.write()

    def _begin_step(self, step: int) -> None:
        if self._first_step is None:
            self._first_step, self._is_in_first_step = step, True
            self._began_after = self._last_step = step - 1
        elif step <= self._last_step:
            self._go_back(step - 1)
        self._step_began = (step - 1, self._loop_s.copy())

    def _go_back(self, step: int) -> None:
        """The run goes on after a step: what was spent on later ones is lost."""
        assert self._first_step is not None, "the run has gone on"
        start = Mark(step=self._began_after, loop_s=[0.0] * len(self._loop_s))
        end = Mark(step=self._last_step, loop_s=self._loop_s)
        # Equal steps stand in the order in which they were noted.
        step_began = Mark(step=self._step_began[0], loop_s=self._step_began[1])
        points = sorted([*self._marks, step_began], key=lambda mark: (mark.step, sum(mark.loop_s)))
        kept_s = list(spent_until([start, *points, end], step))
        self._lost_s += sum(self._loop_s) - sum(kept_s)
        self._num_lost_steps += self._last_step - max(step, self._began_after)
        self._is_first_step_lost |= step < self._first_step
        self._loop_s, self._last_step = kept_s, step
        self._began_after = min(self._began_after, step)
        self._marks = [mark for mark in self._marks if mark.step <= step]

    def _mark(self) -> None:
        if self._first_step is None:
            return
        self._marks = [mark for mark in self._marks if mark.step < self._last_step]
        self._marks.append(Mark(step=self._last_step, loop_s=list(self._loop_s)))
        if len(self._marks) > _MAX_MARKS:
            # The latest ones matter most, and runs go on from these.
            self._marks[: _MAX_MARKS // 2] = self._marks[: _MAX_MARKS // 2 : 2]


def _own_file(log_dir: Path) -> tuple[Path, AttemptLedger | None]:
    """The file to write, and what was written there when the attempt began; None where nobody did.

    Ranks may be started anew within an attempt; what those before them spent stays in its own file.
    """
    path, number = log_dir / GOODPUT_NAME, 1
    while path.exists():
        begun = AttemptLedger.read(path)
        if begun is not None and begun.duration_s == 0.0:
            return path, begun
        number += 1
        path = log_dir / f"goodput-{number}.json"
    return path, None


def _write(path: Path, ledger: AttemptLedger) -> None:
    write_atomically(path, ledger.model_dump_json() + "\n")
