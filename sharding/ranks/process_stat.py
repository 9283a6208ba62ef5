"""What the kernel tells of a process of this machine, from ``/proc/PID/stat``; Linux only."""

from dataclasses import dataclass
from pathlib import Path

# Places after the command's name, which may itself hold spaces and parentheses: proc_pid_stat(5) counts from 3.
_STATE, _PARENT, _START, _EXIT_STATUS = 0, 1, 19, 49


@dataclass(frozen=True)
class ProcessStat:
    """One process.

    Attributes:
        state: a letter, such as ``R``, ``S``, ``T`` for stopped and ``Z`` for a zombie.
        parent: process id of its parent.
        start_ticks: when it was started, in clock ticks since boot: with the boot and the process id this tells it from
            every other process, which wall-clock times do not.
        exit_status: as of ``waitpid``, once it has ended; 0 for a process of somebody else.
    """

    state: str
    parent: int
    start_ticks: int
    exit_status: int

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended; a zombie has, and waits for its parent to ask how."""
        return self.state not in ("Z", "X")


def process_stat(pid: int) -> ProcessStat | None:
    """A process by its id; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return ProcessStat(fields[_STATE], int(fields[_PARENT]), int(fields[_START]), int(fields[_EXIT_STATUS]))
