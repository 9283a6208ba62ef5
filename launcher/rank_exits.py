"""How ranks ended, seen from outside: for launchers whose agents do not say which rank failed first."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sharding.ranks.errors import EXIT_FINISHED, EXIT_STOPPED
from sharding.ranks.process_stat import process_stat
from trainer.faults.failure.report import ProcessEnd

# Ways to end that no code of a rank can report, without SIGABRT since NCCL's watchdog raises it on ranks that another
# rank's failure keeps waiting.
CRASHES = frozenset({signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})


@dataclass(frozen=True)
class RankFailure:
    """The rank that failed first.

    Attributes:
        rank: its number.
        exit_code: as of ``subprocess``: negative is a signal.
        time: when, in seconds since 1970; None where only the order is known.
    """

    rank: int
    exit_code: int
    time: float | None = field(default=None, compare=False)


def root_cause(failures: Sequence[RankFailure]) -> RankFailure:
    """Of failures at the same time: a crash is the cause, the others' exceptions, such as a lost connection, follow.

    Args:
        failures: at least one, the likeliest first.
    """
    return next((failure for failure in failures if -failure.exit_code in CRASHES), failures[0])


class RankExits:
    """Watches an agent's ranks, and keeps what the first to fail ended with.

    The kernel wakes us at a rank's end, long before the agent looks; its exit status stays readable until then.

    Attributes:
        first_failure: the first rank that failed.
        ends: how each rank ended, and when.
        pids: process of each rank.
    """

    def __init__(self, agent_pid: int) -> None:
        """Watch the children of an agent that have a rank."""
        self._agent_pid = agent_pid
        self._ranks: dict[int, tuple[int, int]] = {}
        self._seen: set[int] = set()
        self.first_failure: RankFailure | None = None
        self.ends: dict[int, ProcessEnd] = {}
        self.pids: dict[int, int] = {}

    def close(self) -> None:
        """Stop watching."""
        for descriptor in self._ranks:
            os.close(descriptor)
        self._ranks.clear()

    def wait(self, timeout_s: float) -> None:
        """Look for new ranks, then wait; a rank's end is noted when it happens and does not shorten the wait."""
        self._find_ranks()
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            poller = select.poll()
            for descriptor in self._ranks:
                poller.register(descriptor, select.POLLIN)
            ended = [self._end(descriptor) for descriptor, _ in poller.poll(1000 * left_s)]
            failures = [failure for failure in ended if failure is not None]
            if failures and self.first_failure is None:
                self.first_failure = root_cause(failures)

    def _find_ranks(self) -> None:
        for pid in _children(self._agent_pid) - self._seen:
            rank = _rank(pid)
            if rank is not None:
                self._seen.add(pid)
                self.pids[rank] = pid
                with contextlib.suppress(OSError):
                    self._ranks[os.pidfd_open(pid)] = (pid, rank)

    def _end(self, descriptor: int) -> RankFailure | None:
        pid, rank = self._ranks.pop(descriptor)
        os.close(descriptor)
        process = process_stat(pid)
        if process is None or process.state != "Z":
            return None
        exit_code = os.waitstatus_to_exitcode(process.exit_status)
        self.ends[rank] = ProcessEnd(exit_code, time.time())
        return None if exit_code in (EXIT_FINISHED, EXIT_STOPPED) else RankFailure(rank, exit_code)


def _children(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*"):
        # The agent or a thread of it ended meanwhile; some sandboxes have no such file.
        with contextlib.suppress(OSError):
            found |= set(map(int, (task / "children").read_text().split()))
    return found


def _rank(pid: int) -> int | None:
    """RANK in a process's environment; a process that was only just forked still has its parent's."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(entry[5:]) for entry in environment if entry.startswith(b"RANK=") and entry[5:].isdigit()), None)
