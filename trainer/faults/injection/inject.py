"""Faults on purpose, for drills and tests: what ``SHARDLINE_INJECT`` asks for happens at a phase of a step.

The variable holds a JSON list of faults, such as ``[{"fault": "kill", "rank": 1, "step": 7, "phase": "train"}]``.
Without it nothing here runs.
"""

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter, ValidationError

from sharding.ranks.errors import UserError
from sharding.strict_model import StrictModel
from trainer.run_folder.events import record_event
from trainer.runtime.phases import Phase, Phases, PhaseState

INJECT_VARIABLE = "SHARDLINE_INJECT"

CORRUPTING_FAULTS: tuple[str, ...] = ("nan", "spike")
"""Faults of samples and not of moments: see ``trainer.faults.injection.corrupted_samples``."""


class Fault(StrictModel):
    """One fault."""

    fault: Literal["kill", "term", "hang", "slow", "raise", "nan", "spike"]
    """`kill` and `term` send the rank SIGKILL or SIGTERM, `hang` never returns, `slow` sleeps, `raise` is an error;
    `nan` and `spike` corrupt the loss of the samples that are a step's in a run that skips none."""

    rank: int = Field(default=0, ge=0)
    """Rank on which it is triggered."""

    step: int = Field(default=1, ge=0)
    """Step at which it is triggered, or whose samples it corrupts."""

    num_steps: int = Field(default=1, ge=1)
    """Steps in a row at which it is triggered."""

    phase: Phase = Field(default=Phase.TRAIN, strict=False)
    """Phase at whose beginning it is triggered."""

    attempt: int | None = None
    """Attempt in which it is triggered; None means every one."""

    seconds: float = Field(default=0.0, ge=0.0)
    """Length of each sleep of `slow`."""


def read_faults(environment: Mapping[str, str]) -> list[Fault]:
    """The faults that the environment asks for.

    Raises:
        UserError: the variable is not a list of faults.
    """
    text = environment.get(INJECT_VARIABLE)
    if not text:
        return []
    try:
        return TypeAdapter(list[Fault]).validate_python(json.loads(text))
    except (ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{INJECT_VARIABLE} is not a list of faults ({reason}); unset it.") from None


def faults_of(faults: list[Fault], rank: int, attempt: int) -> list[Fault]:
    """The faults that concern a rank and attempt."""
    return [fault for fault in faults if fault.rank == rank and fault.attempt in (None, attempt)]


def inject_faults(faults: list[Fault], phases: Phases, run_dir: Path, rank: int, attempt: int) -> None:
    """Have the faults that concern this rank and attempt happen when their phase begins.

    Each is an event ``injected`` first, so that no fault on purpose is ever taken for one that happened.
    """
    mine = [fault for fault in faults_of(faults, rank, attempt) if fault.fault not in CORRUPTING_FAULTS]

    def trigger(_: PhaseState, begun: PhaseState) -> None:
        for fault in mine:
            if begun.phase is fault.phase and fault.step <= begun.step < fault.step + fault.num_steps:
                record_event(run_dir, "injected", attempt=attempt, step=begun.step, fault=fault.fault, rank=rank)
                _inject(fault, begun)

    if mine:
        phases.listen(trigger)


def _inject(fault: Fault, begun: PhaseState) -> None:
    match fault.fault:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "hang":
            while True:
                time.sleep(3600)
        case "slow":
            time.sleep(fault.seconds)
        case "raise":
            raise RuntimeError(f"injected at the beginning of {begun.phase} of step {begun.step}")
