"""``failure.json`` and ``failure.md``: merged from what ranks, launcher and kernel left; nothing is guessed."""

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.faults.failure.markdown import describe_failure
from trainer.faults.failure.rank_error import RankError, error_path, read_rank_errors
from trainer.faults.failure.record import (
    FAILURE_NAME,
    FAILURE_TEXT_NAME,
    Evidence,
    Failure,
    FailureKind,
    RankState,
)
from trainer.faults.hang.flight_recorder import flight_path, read_collectives
from trainer.faults.hang.heartbeat import Heartbeat, heartbeat_path, read_heartbeats
from trainer.faults.hang.rank_progress import RankProgress
from trainer.faults.hang.stacks import Frame, innermost, last_stack, read_stack, stacks_path
from trainer.faults.hang.verdict import ALARM_NAME, read_alarm, read_verdict
from trainer.files.atomic_files import write_atomically

_LOG_LINES = 5
_LOG_TAIL_BYTES = 20_000
# Signals that a process raises by what it does itself.
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGSYS})
_REMEDIES = {
    FailureKind.OUT_OF_MEMORY_GPU: "lower batch.micro_size, which changes no result; else divide more "
    "(parallel.strategy=zero3) or recompute (activation_checkpointing.mode=full); --dry-run shows what a rank needs.",
    FailureKind.OUT_OF_MEMORY_HOST: "use fewer data workers, ranks or cached files on this machine, or give the job "
    "more memory.",
    FailureKind.HANG: "look at the line and the stacks of the late rank; the same command continues after the last "
    "checkpoint.",
    FailureKind.KILLED: "find out who sent the signal; the same command continues after the last checkpoint.",
    FailureKind.LOST_NODE: "look at that machine; the same command continues after the last checkpoint.",
    FailureKind.CRASHED: "look at the stack in the rank's log: native code of that line crashed.",
}


@dataclass(frozen=True)
class ProcessEnd:
    """How a rank's process ended, seen from outside.

    Attributes:
        exit_code: as of ``subprocess``: negative is a signal.
        time: when, in seconds since 1970.
    """

    exit_code: int
    time: float

    def __str__(self) -> str:
        """For people."""
        return signal_name(-self.exit_code) if self.exit_code < 0 else f"status {self.exit_code}"


@dataclass(frozen=True)
class Sources:
    """What a report is made from.

    Attributes:
        run_dir: the run's folder.
        attempt: the attempt that failed.
        outcome: outcome.json as it stands at the end.
        ends: how processes ended, by rank, where that was seen.
        first: rank whose process was seen to fail first; None where nobody saw.
        progress: where each rank was last, where that is known to the moment.
        oom_kill: what tells that the kernel killed a rank for memory; None where nothing does.
        evidence: what else was found.
    """

    run_dir: Path
    attempt: int
    outcome: Mapping[str, Any]
    ends: Mapping[int, ProcessEnd] = field(default_factory=dict)
    first: int | None = None
    progress: Mapping[int, RankProgress] = field(default_factory=dict)
    oom_kill: Evidence | None = None
    evidence: Sequence[Evidence] = ()

    @property
    def log_dir(self) -> Path:
        """The attempt's logs."""
        return self.run_dir / "logs" / f"attempt-{self.attempt}"


def write_failure(sources: Sources) -> Failure:
    """Make the report and write both its forms.

    Raises:
        OSError: the run's folder cannot be written.
    """
    failure = build_failure(sources)
    write_atomically(sources.run_dir / FAILURE_TEXT_NAME, describe_failure(failure))
    write_atomically(sources.run_dir / FAILURE_NAME, failure.model_dump_json(indent=2) + "\n")
    return failure


def build_failure(sources: Sources) -> Failure:
    """Tell what failed first.

    A hang that was seen, a process that was seen to crash, an error that blames no peer, a rank that fell silent, in
    this order, go before what ``outcome.json`` says.
    """
    log_dir = sources.log_dir
    beats = {rank: _at(beat, sources.progress.get(rank)) for rank, beat in read_heartbeats(log_dir).items()}
    errors = read_rank_errors(log_dir)
    alarm = read_alarm(log_dir)
    hang = read_verdict(log_dir) if sources.outcome.get("status") != "bad_input" else None
    rank = _first_rank(sources, beats, errors) if hang is None else (hang.late[0] if hang.late else None)
    error = errors.get(rank) if rank is not None else None
    end = sources.ends.get(rank) if rank is not None else None
    beat = beats.get(rank) if rank is not None else None
    frame = _frame(log_dir, rank, beat) if rank is not None else None
    kind = FailureKind.HANG if hang is not None else _kind(sources, rank, error, end, beats, errors)
    # What is surest of the place goes first.
    place = hang or error or beat
    where = hang.where if hang is not None else error.where if error is not None else str(frame) if frame else None
    step = place.step if place is not None else None
    return Failure(
        kind=kind,
        signature=_signature(kind, error, end, where, step),
        attempt=sources.attempt,
        time=_time(alarm, error, end, beat),
        rank=rank,
        phase=place.phase if place is not None else None,
        step=step,
        where=where,
        collective=hang.collective if hang is not None else None,
        reason=hang.reason if hang is not None else _reason(sources, kind, end),
        remedy=_REMEDIES.get(kind),
        ranks=_rank_states(sources, rank, beats, errors, hang.late if hang is not None else ()),
        evidence=_evidence(sources, rank, error, alarm),
        logs=_logs(sources, rank),
    )


def _at(beat: Heartbeat, progress: RankProgress | None) -> Heartbeat:
    return beat if progress is None else beat.model_copy(update=progress._asdict())


def signal_name(number: int) -> str:
    """Name of a signal, such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _first_rank(sources: Sources, beats: dict[int, Heartbeat], errors: dict[int, RankError]) -> int | None:
    crashed = sources.ends.get(sources.first) if sources.first is not None else None
    if crashed is not None and crashed.exit_code < 0:
        return sources.first
    reported = sources.outcome.get("rank")
    own = [error for error in errors.values() if not error.is_consequence]
    if own:
        # The clocks of machines may differ; the outcome's writer was the first to reach the folder.
        chosen = next((error for error in own if error.rank == reported), None)
        return (chosen or min(own, key=lambda error: error.time)).rank
    if errors:
        silent = [rank for rank, beat in beats.items() if rank not in errors and beat.state == "running"]
        if silent:
            return sources.first if sources.first in silent else silent[0]
    return sources.first if sources.first is not None else reported


def _kind(
    sources: Sources,
    rank: int | None,
    error: RankError | None,
    end: ProcessEnd | None,
    beats: dict[int, Heartbeat],
    errors: dict[int, RankError],
) -> FailureKind:
    if end is not None and end.exit_code < 0:
        if -end.exit_code in _CRASHES:
            return FailureKind.CRASHED
        is_oom = end.exit_code == -signal.SIGKILL and sources.oom_kill is not None
        return FailureKind.OUT_OF_MEMORY_HOST if is_oom else FailureKind.KILLED
    if error is not None:
        return error.kind
    if sources.outcome.get("status") == "bad_input":
        return FailureKind.BAD_INPUT
    if rank is None:
        return FailureKind.UNKNOWN
    if end is None and errors and rank in beats:
        host = beats[rank].host
        if all(other.host != host for other in beats.values() if other.rank in errors):
            return FailureKind.LOST_NODE
        return FailureKind.UNKNOWN
    return FailureKind.EXCEPTION


def _signature(
    kind: FailureKind, error: RankError | None, end: ProcessEnd | None, where: str | None, step: int | None
) -> str:
    if kind in (FailureKind.KILLED, FailureKind.LOST_NODE):
        return str(kind)
    what = [str(kind)]
    if kind is FailureKind.CRASHED and end is not None:
        what.append(signal_name(-end.exit_code))
    if kind is not FailureKind.HANG and error is not None:
        what.append(error.type)
    return " ".join([*what, f"at {where or 'an unknown line'}", f"in step {step if step is not None else 'unknown'}"])


def _reason(sources: Sources, kind: FailureKind, end: ProcessEnd | None) -> str:
    reason = str(sources.outcome.get("reason", "nobody could say why"))
    if end is None and kind in (FailureKind.UNKNOWN, FailureKind.LOST_NODE):
        return f"{reason}; how the process ended was not seen"
    return reason


def _time(
    alarm: Mapping[str, Any], error: RankError | None, end: ProcessEnd | None, beat: Heartbeat | None
) -> float | None:
    if alarm:
        return float(alarm["time"])
    return error.time if error is not None else end.time if end is not None else beat.time if beat is not None else None


def _frame(log_dir: Path, rank: int, beat: Heartbeat | None) -> Frame | None:
    """Where a rank's main thread stood by its stacks, or the thread that crashed by its log."""
    if beat is None:
        return None
    frames = read_stack(log_dir, rank, beat.main_thread)
    return innermost(frames or last_stack(_tail(rank_log(log_dir, rank)).splitlines()))


def _rank_states(
    sources: Sources,
    first: int | None,
    beats: dict[int, Heartbeat],
    errors: dict[int, RankError],
    late: tuple[int, ...],
) -> list[RankState]:
    states = []
    for rank in sorted(beats.keys() | errors.keys() | sources.ends.keys()):
        beat, error, end = beats.get(rank), errors.get(rank), sources.ends.get(rank)
        collectives = read_collectives(sources.log_dir, rank) or []
        pending = next((one for one in collectives if one.is_pending), None)
        waited = pending or (collectives[-1] if collectives and error is not None and error.is_consequence else None)
        frame = _frame(sources.log_dir, rank, beat)
        role = "unknown" if beat is None else "ended" if beat.state == "ended" else "running"
        if rank in late:
            role = "late"
        elif rank == first:
            role = "first"
        elif waited is not None:
            role = "waiting"
        states.append(
            RankState.model_validate(
                {
                    "rank": rank,
                    "role": role,
                    "host": beat and beat.host,
                    "pid": beat and beat.pid,
                    "phase": beat and beat.phase,
                    "step": beat.step if beat is not None else None,
                    "in_phase_s": round(beat.in_phase_s, 3) if beat is not None else None,
                    "heartbeat_at": beat.time if beat is not None else None,
                    "collective": str(waited) if waited is not None else None,
                    "where": error.where if error is not None else str(frame) if frame is not None else None,
                    "exit": str(end) if end is not None else None,
                    "error": f"{error.type}: {error.message}" if error is not None else None,
                    "peak_rss_gib": round(beat.peak_rss_gib, 3) if beat is not None else None,
                    "log": _relative(sources, rank_log(sources.log_dir, rank)),
                }
            )
        )
    return states


def _evidence(sources: Sources, rank: int | None, error: RankError | None, alarm: Mapping[str, Any]) -> list[Evidence]:
    found = [Evidence(source="outcome.json", text=str(dict(sources.outcome)))]
    if alarm:
        found.append(Evidence(source=_relative(sources, sources.log_dir / ALARM_NAME) or ALARM_NAME, text=str(alarm)))
    if error is not None:
        path = _relative(sources, error_path(sources.log_dir, error.rank))
        found.append(Evidence(source=path or "error file", text=error.traceback.strip()))
    for one, end in sorted(sources.ends.items()):
        at = time.strftime("%H:%M:%S", time.localtime(end.time))
        found.append(Evidence(source="the launcher", text=f"rank {one} ended with {end} at {at}"))
    found += [sources.oom_kill] if sources.oom_kill is not None else []
    found += sources.evidence
    log = rank_log(sources.log_dir, rank) if rank is not None else sources.log_dir / "launcher.log"
    lines = _tail(log).strip().splitlines()[-_LOG_LINES:]
    if lines:
        found.append(Evidence(source=_relative(sources, log) or "log", text="\n".join(lines)))
    return found


def _logs(sources: Sources, rank: int | None) -> list[str]:
    paths = [sources.log_dir / "launcher.log"]
    if rank is not None:
        paths = [rank_log(sources.log_dir, rank), *paths]
        paths += [path(sources.log_dir, rank) for path in (error_path, stacks_path, flight_path, heartbeat_path)]
    return [relative for path in paths if (relative := _relative(sources, path)) is not None]


def _relative(sources: Sources, path: Path) -> str | None:
    return str(path.relative_to(sources.run_dir)) if path.exists() else None


def rank_log(log_dir: Path, rank: int) -> Path:
    """Where a rank's log is."""
    return log_dir / f"rank-{rank}.log"


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
