"""``failure.json``: what ended an attempt, in a form that scripts and the next attempt read; imports no torch."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import Field

from sharding.strict_model import StrictRecord
from trainer.runtime.phases import Phase

FAILURE_NAME = "failure.json"
FAILURE_TEXT_NAME = "failure.md"


class FailureKind(StrEnum):
    """What sort of failure it was."""

    EXCEPTION = "exception"
    """A rank's own code raised an error."""

    KILLED = "killed"
    """A rank was ended by a signal from outside, such as SIGKILL or SIGTERM."""

    CRASHED = "crashed"
    """Native code of a rank crashed: SIGSEGV, SIGBUS, SIGABRT and their like."""

    HANG = "hang"
    """A rank stood still beyond its deadline."""

    OUT_OF_MEMORY_GPU = "out_of_memory_gpu"
    """An allocation on a GPU failed."""

    OUT_OF_MEMORY_HOST = "out_of_memory_host"
    """The kernel's OOM killer ended a rank, or an allocation on the host failed."""

    NONFINITE = "nonfinite"
    """Too many steps in a row were not finite."""

    BAD_INPUT = "bad_input"
    """The user's input is wrong."""

    LOST_NODE = "lost_node"
    """All ranks of a node fell silent at once."""

    UNKNOWN = "unknown"
    """Nobody could say."""


class Evidence(StrictRecord):
    """Something that was found, and where."""

    source: str
    """File, or what was asked, such as `/proc` or the launcher."""

    text: str
    """What it says, quoted."""


class RankState(StrictRecord):
    """One rank at the time of the failure."""

    rank: int = Field(ge=0)
    """Its number."""

    role: Literal["first", "late", "waiting", "running", "silent", "ended", "unknown"]
    """`first` failed first, `late` was waited for, `waiting` waited in a collective, `silent` had no heartbeat left."""

    host: str | None = None
    """Its machine."""

    pid: int | None = None
    """Its process."""

    phase: Phase | None = Field(default=None, strict=False)
    """What it was doing by its last heartbeat."""

    step: int | None = None
    """Optimizer step that it worked on, from 1; 0 before the first."""

    in_phase_s: float | None = None
    """Seconds that it had been in this phase."""

    heartbeat_at: float | None = None
    """Time of its last heartbeat, in seconds since 1970 on its machine's clock."""

    collective: str | None = None
    """The collective that it had not finished, or the last that it had begun."""

    where: str | None = None
    """Innermost line of our or the user's code that it was at."""

    exit: str | None = None
    """How its process ended, where that was seen: `status 1`, `SIGKILL`."""

    error: str | None = None
    """What it reported itself."""

    peak_rss_gib: float | None = None
    """Highest resident memory by its last heartbeat, in GiB."""

    log: str | None = None
    """Its log, relative to the run's folder."""


class Failure(StrictRecord):
    """Why an attempt failed. What is not known is None, and ``reason`` says so."""

    format_version: Literal[1] = 1
    """Version of this form."""

    kind: FailureKind = Field(strict=False)
    """What sort of failure it was."""

    signature: str
    """Identity of the failure, the same on whichever rank fails: kind, exception type, innermost line of our or
    the user's code, and step; just `killed` for a signal from outside."""

    attempt: int = Field(ge=0)
    """Attempt that failed."""

    time: float | None = None
    """When it failed, in seconds since 1970."""

    rank: int | None = None
    """Rank that failed first, or that the others waited for."""

    phase: Phase | None = Field(default=None, strict=False)
    """What that rank was doing."""

    step: int | None = None
    """Optimizer step that it worked on, from 1; 0 before the first."""

    where: str | None = None
    """Innermost line of our or the user's code that it was at."""

    collective: str | None = None
    """For a hang: the collective that the others waited in."""

    reason: str
    """One sentence."""

    remedy: str | None = None
    """What to do about it, where that is known."""

    ranks: list[RankState] = []
    """Every rank that left a trace, in order."""

    evidence: list[Evidence] = []
    """What the above rests on."""

    logs: list[str] = []
    """Files to read on, relative to the run's folder."""


def read_failure(run_dir: Path) -> Failure | None:
    """Why the latest attempt of a run failed; None where it did not, or left no readable report."""
    return Failure.read(run_dir / FAILURE_NAME)


def set_failure_aside(run_dir: Path) -> None:
    """Move the report of an earlier attempt's failure to that attempt's logs; call it where an attempt begins."""
    failure = read_failure(run_dir)
    if failure is None:
        return
    folder = run_dir / "logs" / f"attempt-{failure.attempt}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in (FAILURE_NAME, FAILURE_TEXT_NAME):
        if (run_dir / name).exists():
            os.replace(run_dir / name, folder / name)
