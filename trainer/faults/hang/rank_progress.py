"""Each rank's phase and step to the moment, in memory that the launcher holds: it outlives a rank that is killed.

A heartbeat is up to a second old; which step a crash was in tells whether it is the same crash again.
"""

import contextlib
import mmap
import os
import struct
from collections.abc import Mapping
from typing import NamedTuple

from trainer.runtime.phases import Phase, Phases, PhaseState

PROGRESS_VARIABLE = "SHARDLINE_RANK_PROGRESS"
_RECORD = struct.Struct("<qq")
_MAX_RANKS = 4096
_PHASES = tuple(Phase)


class RankProgress(NamedTuple):
    """How far a rank has come: its phase, and the optimizer step that it works on, from 1; 0 before the first."""

    phase: Phase
    step: int


class ProgressMemory:
    """Memory without a name in any file system; it is gone with the launcher, however that ends."""

    def __init__(self) -> None:
        """Reserve it; Linux only, elsewhere nothing is known."""
        self._descriptor: int | None = None
        # A sandbox may forbid it.
        with contextlib.suppress(AttributeError, OSError):
            self._descriptor = os.memfd_create("shardline-rank-progress")
            os.ftruncate(self._descriptor, _MAX_RANKS * _RECORD.size)

    @property
    def variables(self) -> dict[str, str]:
        """What ranks need in their environment to find it."""
        return {} if self._descriptor is None else {PROGRESS_VARIABLE: f"/proc/{os.getpid()}/fd/{self._descriptor}"}

    def close(self) -> None:
        """Give it back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_progress(environment: Mapping[str, str]) -> dict[int, RankProgress]:
    """Where each rank of this machine is, or was last, by rank; empty where no launcher holds the memory."""
    progress: dict[int, RankProgress] = {}
    with contextlib.suppress(KeyError, OSError), open(environment[PROGRESS_VARIABLE], "rb") as file:
        for rank, (phase, step) in enumerate(_RECORD.iter_unpack(file.read())):
            if phase:
                progress[rank] = RankProgress(_PHASES[phase - 1], step)
    return progress


def publish_progress(phases: Phases, rank: int, environment: Mapping[str, str]) -> None:
    """Write this rank's phase and step at each change from here on: 16 bytes of memory, no system call."""
    if rank >= _MAX_RANKS:
        return
    try:
        with open(environment[PROGRESS_VARIABLE], "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
    except (KeyError, OSError):
        return
    numbers = {phase: index + 1 for index, phase in enumerate(_PHASES)}

    def write(_: PhaseState, begun: PhaseState) -> None:
        _RECORD.pack_into(memory, rank * _RECORD.size, numbers[begun.phase], begun.step)

    write(phases.now, phases.now)
    phases.listen(write)
