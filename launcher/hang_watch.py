"""Ranks that cannot watch themselves: the launcher sees that all of their heartbeats stand still."""

import time
from collections.abc import Mapping
from pathlib import Path

from sharding.ranks.errors import EXIT_FAILED
from trainer.faults.hang.deadlines import is_overdue
from trainer.faults.hang.heartbeat import Heartbeat, Pulse, RunningTime, read_heartbeats
from trainer.faults.hang.rank_process import ask_for_stacks, is_debugged
from trainer.faults.hang.rank_progress import read_progress
from trainer.faults.hang.verdict import conclude_hang, raise_alarm
from trainer.run_folder.events import record_event
from trainer.run_folder.folder import RunFolder

# A rank that beats within this time judges for itself, and for the others.
_SILENT_AFTER_S = 5.0
_STACKS_WITHIN_S = 0.5


class HangWatch:
    """Looks at the heartbeats of an attempt's ranks, all of them on this machine."""

    def __init__(self, run_folder: RunFolder, log_dir: Path, variables: Mapping[str, str]) -> None:
        """Look from now on.

        Args:
            run_folder: the run's folder.
            log_dir: the attempt's logs.
            variables: where ranks publish their progress.
        """
        self._variables = variables
        self._run_folder = run_folder
        self._log_dir = log_dir
        self._running = RunningTime(time.monotonic())
        self._pulse = Pulse(log_dir, self._running)
        self._has_stacks = False

    def look(self, since_last_s: float) -> None:
        """Raise the alarm, and say how the run ended, where no rank is left to do it.

        Args:
            since_last_s: seconds that were to lie between this look and the one before.
        """
        now = time.monotonic()
        self._running.tick(now, since_last_s)
        pulses = {rank: pulse for rank, pulse in self._pulse.look(now).items() if pulse[0].state != "ended"}
        if not pulses or not all(_is_lost(beat, still_s) for beat, still_s in pulses.values()):
            return
        beats = [beat for beat, _ in pulses.values()]
        raise_alarm(self._log_dir, None, pulses)
        _ask_for_stacks(beats)
        self._has_stacks = True
        hang = conclude_hang(self._log_dir, read_progress(self._variables))
        step = min(beat.step for beat in beats)
        late = hang.late[0] if hang.late else None
        if self._run_folder.write_outcome("failed", EXIT_FAILED, max(step - 1, 0), hang.reason, late):
            attempt = int(self._log_dir.name.rpartition("-")[2])
            record_event(self._run_folder.path, "hang", attempt=attempt, step=step, rank=late, reason=hang.reason)

    def keep_stacks(self) -> None:
        """Have the ranks that a failure has left write their stacks, once, before they are ended."""
        if not self._has_stacks:
            self._has_stacks = True
            _ask_for_stacks([beat for beat in read_heartbeats(self._log_dir).values() if beat.state == "running"])


def _ask_for_stacks(beats: list[Heartbeat]) -> None:
    """Have ranks of this machine write their stacks, and give them a moment for it."""
    for beat in beats:
        ask_for_stacks(beat)
    if beats:
        time.sleep(_STACKS_WITHIN_S)


def _is_lost(beat: Heartbeat, still_s: float) -> bool:
    return still_s > _SILENT_AFTER_S and is_overdue(beat, still_s) and not is_debugged(beat)
