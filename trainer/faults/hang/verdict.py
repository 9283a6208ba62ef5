"""Who was late in a hang: from what every rank wrote down before it was ended, and from nothing else."""

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from sharding.strict_model import StrictRecord
from trainer.faults.hang.deadlines import position
from trainer.faults.hang.flight_recorder import Collective, read_collectives
from trainer.faults.hang.heartbeat import Heartbeat, read_heartbeats
from trainer.faults.hang.rank_process import process_state
from trainer.faults.hang.rank_progress import RankProgress
from trainer.faults.hang.stacks import Frame, innermost, read_stack
from trainer.files.atomic_files import create_once
from trainer.runtime.phases import Phase

ALARM_NAME = "alarm.json"
VERDICT_NAME = "hang.json"


@dataclass(frozen=True)
class Traces:
    """What one rank left.

    Attributes:
        heartbeat: its last.
        collectives: its latest, oldest first; None where it could not write them.
        frame: innermost line of our or the user's code that its main thread was at; None where it is not known.
        process: state of its process as the kernel gave it, where somebody looked.
        silent_s: seconds for which its heartbeat had stood still when the alarm was raised.
    """

    heartbeat: Heartbeat
    collectives: list[Collective] | None = None
    frame: Frame | None = None
    process: str | None = None
    silent_s: float = 0.0

    @property
    def pending(self) -> Collective | None:
        """The first collective whose end it did not see."""
        return next((one for one in self.collectives or [] if one.is_pending), None)


class Hang(StrictRecord):
    """A verdict."""

    late: tuple[int, ...] = Field(default=(), strict=False)
    """Ranks that the others waited for; empty where that cannot be told."""

    phase: Phase | None = Field(default=None, strict=False)
    """What the first of them was doing."""

    step: int | None = None
    """At which step."""

    where: str | None = None
    """Innermost line of our or the user's code that it was at."""

    collective: str | None = None
    """What the others waited in."""

    reason: str
    """One sentence."""


def read_traces(log_dir: Path, progress: Mapping[int, RankProgress]) -> dict[int, Traces]:
    """What the ranks of an attempt left, by rank.

    Args:
        log_dir: the attempt's.
        progress: phase and step of ranks, where they are known to the moment.
    """
    suspects = read_alarm(log_dir).get("suspects", {})
    return {
        rank: Traces(
            _at(heartbeat, progress.get(rank)),
            read_collectives(log_dir, rank),
            innermost(read_stack(log_dir, rank, heartbeat.main_thread)),
            suspects.get(str(rank), {}).get("process"),
            suspects.get(str(rank), {}).get("silent_s", 0.0),
        )
        for rank, heartbeat in read_heartbeats(log_dir).items()
        if heartbeat.state != "ended"
    }


def _at(heartbeat: Heartbeat, progress: RankProgress | None) -> Heartbeat:
    """The heartbeat, with the progress of a rank that has written nothing since then."""
    if progress is None or heartbeat.state != "running":
        return heartbeat
    return heartbeat.model_copy(update=progress._asdict())


def raise_alarm(log_dir: Path, seen_by: Heartbeat | None, suspects: Mapping[int, tuple[Heartbeat, float]]) -> None:
    """Let every rank know of a hang, unless it is known; with what can be seen of the other ranks from here.

    Where that cannot be written, on a full disk say, the others find the hang themselves: no reason not to end.

    Args:
        log_dir: the attempt's.
        seen_by: the rank that raises it; None for the launcher.
        suspects: the other ranks' heartbeats, and for how long each has stood still.
    """
    alarm: dict[str, Any] = {
        "seen_by": "the launcher" if seen_by is None else f"rank {seen_by.rank}",
        "time": time.time(),
        "suspects": {
            str(rank): {"process": process_state(beat), "silent_s": round(silent_s, 1)}
            for rank, (beat, silent_s) in suspects.items()
        },
    }
    if seen_by is not None:
        alarm |= {"phase": seen_by.phase, "step": seen_by.step, "allowance_s": seen_by.allowance_s}
    with contextlib.suppress(OSError):
        create_once(log_dir / ALARM_NAME, json.dumps(alarm) + "\n")


def conclude_hang(log_dir: Path, progress: Mapping[int, RankProgress]) -> Hang:
    """Judge, and write the verdict down, unless somebody has done so: ranks may come to life again."""
    hang = judge(read_traces(log_dir, progress))
    with contextlib.suppress(OSError):
        create_once(log_dir / VERDICT_NAME, hang.model_dump_json() + "\n")
    return read_verdict(log_dir) or hang


def read_verdict(log_dir: Path) -> Hang | None:
    """The verdict of an attempt; None where there was no hang."""
    return Hang.read(log_dir / VERDICT_NAME)


def read_alarm(log_dir: Path) -> dict[str, Any]:
    """What whoever saw the hang first noted; empty where nobody has seen one."""
    try:
        alarm: dict[str, Any] = json.loads((log_dir / ALARM_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return alarm


def judge(traces: dict[int, Traces]) -> Hang:
    """Tell who was late.

    In this order: a rank that no longer answered; one that is in no collective while others are; one whose collective
    of the same group has a lower number; one that is behind in step and phase. Ranks whose collectives of one number
    differ are named as that.

    Args:
        traces: what each rank left.
    """
    waiting = {rank: one.pending for rank, one in traces.items() if one.pending is not None}
    disagreement = _disagreement(waiting)
    if disagreement:
        return Hang(reason=disagreement)
    late = _late(traces, waiting)
    waited_in = {rank: collective for rank, collective in waiting.items() if rank not in late}
    rest = _describe_rest(traces, waited_in, late)
    if late:
        reason = f"{'; '.join(_describe_late(traces[rank]) for rank in late)}{rest}"
    else:
        reason = f"no rank went on, and none of them was behind the others{rest}"
    first = traces[late[0]] if late else None
    collective = next(iter(waited_in.values()), None)
    return Hang(
        late=late,
        phase=first.heartbeat.phase if first is not None else None,
        step=first.heartbeat.step if first is not None else None,
        where=str(first.frame) if first is not None and first.frame is not None else None,
        collective=str(collective) if collective is not None else None,
        reason=reason + ".",
    )


def _late(traces: dict[int, Traces], waiting: dict[int, Collective]) -> tuple[int, ...]:
    silent = [rank for rank, one in traces.items() if one.heartbeat.state == "running"]
    if silent and len(silent) < len(traces):
        return tuple(silent)
    outside = [rank for rank in traces if rank not in waiting]
    if waiting and outside:
        return tuple(outside)
    numbers = defaultdict(dict)  # type: defaultdict[str, dict[int, int]]
    for rank, collective in waiting.items():
        numbers[collective.group][rank] = collective.number
    behind = {rank for group in numbers.values() for rank in group if group[rank] < max(group.values())}
    if behind:
        return tuple(sorted(behind))
    places = {rank: position(one.heartbeat) for rank, one in traces.items()}
    least = min(places.values(), default=None)
    if len(traces) == 1 or len(set(places.values())) > 1:
        return tuple(rank for rank in places if places[rank] == least)
    return ()


def _disagreement(waiting: dict[int, Collective]) -> str:
    """A sentence where ranks called different collectives of one number; empty where they did not."""
    calls = defaultdict(lambda: defaultdict(list))  # type: defaultdict[tuple[str, int], defaultdict[str, list[int]]]
    for rank, collective in waiting.items():
        calls[collective.group, collective.number][collective.operation].append(rank)
    for (group, number), operations in sorted(calls.items()):
        if len(operations) > 1:
            sides = "; ".join(f"{name_ranks(ranks)} called {operation}" for operation, ranks in operations.items())
            return f"ranks called different collectives as #{number} of {group}: {sides}."
    return ""


def _describe_late(one: Traces) -> str:
    beat = one.heartbeat
    place = f"rank {beat.rank} on {beat.host}"
    where = f" at {one.frame}" if one.frame is not None else ""
    state = f", its process being in state {one.process}" if one.process else ""
    stood = "no longer answered" if beat.state == "running" else "stood still"
    collective = f" in {one.pending}" if one.pending is not None else ""
    moment = f"in phase {beat.phase} of step {beat.step}{where}{collective}"
    if beat.state == "running":
        return f"{place} {stood} for {one.silent_s:.1f} s, and was last seen {moment}{state}"
    return f"{place} {stood} {moment}, after {beat.in_phase_s:.1f} s there (deadline {beat.allowance_s:.1f} s)"


def _describe_rest(traces: dict[int, Traces], waited_in: dict[int, Collective], late: tuple[int, ...]) -> str:
    groups = defaultdict(list)  # type: defaultdict[str, list[int]]
    for rank, collective in waited_in.items():
        groups[f"waited in {collective}"].append(rank)
    for rank, one in traces.items():
        if rank not in waited_in and rank not in late:
            groups[f"was in phase {one.heartbeat.phase} of step {one.heartbeat.step}"].append(rank)
    return "".join(f"; {name_ranks(ranks)} {what}" for what, ranks in groups.items())


def name_ranks(ranks: Iterable[int]) -> str:
    """Ranks for people: ``rank 3``, ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"{'rank' if len(runs) == 1 and runs[0][0] == runs[0][1] else 'ranks'} {text}"
