"""Slurm's own commands: what is asked of them, and what they say. Needs no accounting."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from sharding.ranks.errors import RunFailure, UserError

# Until one of these, a job can still write to its run.
_ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "REVOKED"}
)


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it.

    Attributes:
        state: in Slurm's words, such as PENDING or RUNNING.
        nodes: its nodes; empty before it has some.
        time_left: until its time limit, as days-hours:minutes:seconds.
        reason: why it waits, or ended.
    """

    state: str
    nodes: str
    time_left: str
    reason: str

    @property
    def is_active(self) -> bool:
        """Whether it waits, runs or ends."""
        return self.state not in _ENDED


def queued_jobs() -> dict[str, QueuedJob]:
    """All jobs of this user that Slurm still knows, by number; a task of an array is ``ARRAY_TASK``."""
    listed = call(["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%N|%L|%r"])
    jobs = {}
    for line in listed.splitlines():
        number, *fields = line.split("|", maxsplit=4)
        jobs[number] = QueuedJob(*fields)
    return jobs


def call(command: Sequence[str]) -> str:
    """Run a command of Slurm's; returns what it prints.

    Raises:
        UserError: it is not there.
        RunFailure: it failed.
    """
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=login_environment(), check=False
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not on PATH; run this on a machine of a Slurm cluster.") from None
    if finished.returncode:
        # Slurm's commands begin what they say with their own name.
        said = " ".join(finished.stderr.split())
        raise RunFailure(said or f"{command[0]} ended with status {finished.returncode}")
    return finished.stdout


def login_environment() -> dict[str, str]:
    """This environment without the variables of a job that we may be in: another job would inherit them."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
    return {name: value for name, value in os.environ.items() if name in kept or not name.startswith("SLURM")}
