"""The watchdog of one rank: it beats, looks at the others when things take long, and ends a rank that hangs."""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from trainer.faults.hang.deadlines import Deadlines, is_hang
from trainer.faults.hang.flight_recorder import dump_flight_recorder
from trainer.faults.hang.heartbeat import (
    Heartbeat,
    HeartbeatFile,
    Pulse,
    RunningTime,
    State,
    main_thread_id,
    peak_rss_gib,
    read_heartbeats,
)
from trainer.faults.hang.rank_process import am_i_debugged, ask_for_stacks, is_debugged
from trainer.faults.hang.rank_progress import publish_progress, read_progress
from trainer.faults.hang.stacks import StacksFile
from trainer.faults.hang.verdict import ALARM_NAME, Hang, conclude_hang, raise_alarm, read_alarm
from trainer.runtime.phases import Phases
from trainer.runtime.processes import process_space

_BEAT_EVERY_S = 1.0
# Beyond this many ranks each beats less often, so that a file system sees as many beats a second.
_RANKS_AT_FULL_RATE = 64
_TICKS_PER_BEAT = 2
# A rank that is alive has seen the alarm and written its dumps within this time; whoever has not is not.
_GATHER_WITHIN_S = 4.0
_STACKS_WITHIN_S = 0.5
# Whose heartbeat had stood still for so long at the alarm is not waited for.
_SILENT_AFTER_S = 3.0


class Watchdog:
    """Watches one rank's phases from a thread of its own; nothing on its path is a collective.

    In a healthy run it writes one small file a second. Only when the present phase has taken half of ``min_s`` does it
    look for an alarm, and at half of its allowance at the other ranks. Whoever is overdue while nobody behind it is
    still in time raises the alarm; then every rank writes its stacks and its flight recorder, all judge alike from
    these files, and end.
    """

    def __init__(
        self,
        phases: Phases,
        deadlines: Deadlines,
        log_dir: Path,
        *,
        rank: int,
        world_size: int,
        min_s: float,
        on_hang: Callable[[Hang], NoReturn],
    ) -> None:
        """Take the files and the signal for stacks; ``start`` begins.

        Args:
            phases: what the rank is doing.
            deadlines: how long it may.
            log_dir: folder of this attempt's logs, the same for all ranks.
            rank: number of this rank.
            world_size: number of ranks.
            min_s: least allowance in seconds.
            on_hang: says so and ends the process; is called in the watchdog's thread.
        """
        self._phases = phases
        self._deadlines = deadlines
        self._log_dir = log_dir
        self._rank = rank
        self._world_size = world_size
        self._min_s = min_s
        self._on_hang = on_hang
        self._tick_s = _BEAT_EVERY_S * max(1.0, world_size / _RANKS_AT_FULL_RATE) / _TICKS_PER_BEAT
        self._file = HeartbeatFile(log_dir, rank)
        self._stacks = StacksFile(log_dir, rank)
        self._running = RunningTime(time.monotonic())
        self._pulse = Pulse(log_dir, self._running)
        self._host, self._process_space = socket.gethostname(), process_space()
        self._num_beats = 0
        self._state: State = "running"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._phases.listen(self._deadlines.listen)
        publish_progress(self._phases, self._rank, os.environ)
        self._beat("running")
        self._thread.start()

    def stop(self) -> None:
        """The rank ends by itself: nobody needs to wait for it or watch it any more."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._thread.join(self._tick_s)
        self._stacks.close()
        self._beat("ended")

    def _watch(self) -> None:
        for tick in range(sys.maxsize):
            if self._stopped.wait(self._tick_s):
                return
            now = time.monotonic()
            self._running.tick(now, self._tick_s)
            if tick % _TICKS_PER_BEAT == 0:
                self._look_for_debugger(now)
                self._beat(self._state)
            own = self._heartbeat(self._state)
            if self._is_hang(own, now) and not self._stopped.is_set():
                self._end()

    def _look_for_debugger(self, now: float) -> None:
        self._state = "debugged" if am_i_debugged() else "running"
        if self._state == "debugged":
            self._running.excuse(self._phases.now.since, now)

    def _is_hang(self, own: Heartbeat, now: float) -> bool:
        """Whether somebody has raised the alarm, or this rank does now."""
        if own.in_phase_s < min(self._min_s, own.allowance_s) / 2:
            return False
        if (self._log_dir / ALARM_NAME).exists():
            return True
        if own.in_phase_s < own.allowance_s / 2:
            return False
        others = self._pulse.look(now)
        others.pop(self._rank, None)
        if any(is_debugged(beat) for beat, _ in others.values()):
            # Whoever waits for a rank that somebody debugs has all its time left afterwards.
            self._running.excuse(self._phases.now.since, now)
            return False
        if self._state == "debugged" or not is_hang(own, others.values()):
            return False
        raise_alarm(self._log_dir, own, others)
        return True

    def _end(self) -> None:
        """Write down everything, wait until the others have, judge, and go."""
        self._stacks.dump()
        # Native code that may not be in order any more; the stacks are there already.
        with contextlib.suppress(Exception):
            dump_flight_recorder(self._log_dir, self._rank)
        self._beat("dumped")
        suspects = read_alarm(self._log_dir).get("suspects", {})
        awaited = {rank for rank in range(self._world_size) if not _is_silent(suspects.get(str(rank)))}
        deadline = time.monotonic() + _GATHER_WITHIN_S
        while awaited and time.monotonic() < deadline:
            time.sleep(0.1)
            awaited -= {rank for rank, beat in read_heartbeats(self._log_dir).items() if beat.state != "running"}
        silent = [beat for beat in read_heartbeats(self._log_dir).values() if beat.state == "running"]
        for heartbeat in silent:
            ask_for_stacks(heartbeat)
        if silent:
            time.sleep(_STACKS_WITHIN_S)
        self._on_hang(conclude_hang(self._log_dir, read_progress(os.environ)))

    def _beat(self, state: State) -> None:
        self._num_beats += 1
        # A file system that is away for a moment; others see a heartbeat that stands still meanwhile.
        with contextlib.suppress(OSError):
            self._file.write(self._heartbeat(state))

    def _heartbeat(self, state: State) -> Heartbeat:
        phase_state = self._phases.now
        return Heartbeat(
            rank=self._rank,
            host=self._host,
            process_space=self._process_space,
            pid=os.getpid(),
            main_thread=main_thread_id(),
            beat=self._num_beats,
            time=time.time(),
            phase=phase_state.phase,
            step=phase_state.step,
            in_phase_s=self._running.since(phase_state.since, time.monotonic()),
            allowance_s=self._deadlines.allowance_s(phase_state.phase),
            peak_rss_gib=peak_rss_gib(),
            state=state,
        )


def _is_silent(suspect: dict[str, Any] | None) -> bool:
    return suspect is not None and suspect["silent_s"] >= _SILENT_AFTER_S
