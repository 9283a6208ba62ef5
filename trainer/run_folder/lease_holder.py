"""Who holds a run folder, and what this machine can tell of whether it is still there."""

import contextlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from trainer.runtime.processes import process_space, process_start

_ASK_SLURM_WITHIN_S = 30.0
# In these a start of a job has no process left; a pending job will be started anew.
_OVER = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PENDING", "TIMEOUT"}
)


class Verdict(Enum):
    """Whether a holder is still there."""

    ALIVE = "alive"
    GONE = "gone"
    UNKNOWN = "unknown"
    """Only its heartbeat can tell."""


def new_holder(token: str) -> dict[str, Any]:
    """What a lease says of this process. Its time is for people: no clock is ever compared with another's."""
    return {
        "host": socket.gethostname(),
        "process_space": process_space(),
        "pid": os.getpid(),
        "process_started": process_start(os.getpid()),
        "attempt": None,
        "token": token,
        "heartbeat": time.time(),
        "num_beats": 0,
        "user_id": os.getuid(),
        "slurm_job": _slurm_job(os.environ),
        "slurm_cluster": os.environ.get("SLURM_CLUSTER_NAME"),
    }


def next_beat(holder: dict[str, Any]) -> dict[str, Any]:
    """The same holder, which has given another sign of life."""
    return holder | {"heartbeat": time.time(), "num_beats": holder.get("num_beats", 0) + 1}


def describe(holder: dict[str, Any]) -> str:
    """It in words."""
    attempt = f", attempt {holder['attempt']}" if holder["attempt"] else ""
    return f"process {holder['pid']} on {holder['host']}{attempt}"


def judge(holder: dict[str, Any]) -> Verdict:
    """Where its process can be seen, the process itself tells; elsewhere the batch system, if it can."""
    if holder["process_space"] == process_space():
        is_there = process_start(holder["pid"]) == holder["process_started"]
        return Verdict.ALIVE if is_there else Verdict.GONE
    own_job, its_job = _slurm_job(os.environ), holder.get("slurm_job")
    if not its_job:
        return Verdict.UNKNOWN
    if own_job and own_job[0] == its_job[0] and own_job[1] > its_job[1]:
        # Slurm starts a job again when no process of its last start is left, or the node is dead.
        return Verdict.GONE
    # A cluster may hide the jobs of other users, which then look as if they were over.
    is_ours = holder.get("user_id") == os.getuid()
    return Verdict.GONE if is_ours and _is_job_over(its_job[0], holder.get("slurm_cluster")) else Verdict.UNKNOWN


def _is_job_over(job: int, cluster: str | None) -> bool:
    """Whether Slurm says so; numbers of jobs mean nothing on another cluster."""
    if cluster is None or _local_cluster() != cluster:
        return False
    asked = _call(["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"])
    if asked is None:
        return False
    if asked.returncode:
        # Only this error says that the job is gone, since Slurm forgets a job some minutes after its end.
        return "Invalid job id" in asked.stderr
    states = asked.stdout.split()
    return bool(states) and all(state in _OVER for state in states)


def _local_cluster() -> str | None:
    asked = _call(["scontrol", "show", "config"])
    found = re.search(r"^ClusterName\s*=\s*(\S+)", asked.stdout, re.MULTILINE) if asked is not None else None
    return found.group(1) if found else None


def _call(command: Sequence[str]) -> subprocess.CompletedProcess[str] | None:
    """What one of Slurm's commands says; None where there is none, or it does not answer."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_ASK_SLURM_WITHIN_S, check=False
        )
    return None


def _slurm_job(environment: Mapping[str, str]) -> list[int] | None:
    """Number of this Slurm job and how often it was started again; None outside of one."""
    job, restarts = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_RESTART_COUNT", "0")
    return [int(job), int(restarts)] if job.isdigit() and restarts.isdigit() else None
