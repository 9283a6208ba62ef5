"""Who was late in a hang: from what every rank wrote down before it was ended, and from nothing else."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.deadlines import position
from trainer.flight_recorder import Collective, read_collectives
from trainer.heartbeat import Heartbeat, read_heartbeats
from trainer.stacks import Frame, innermost, read_stack

ALARM_NAME = "hang.json"


@dataclass(frozen=True)
class Traces:
    """What one rank left.

    Attributes:
        heartbeat: its last.
        collectives: its latest, oldest first; None where it could not write them.
        frame: innermost line of our or the user's code that its main thread was at; None where it is not known.
        process: state of its process as the kernel gave it, where somebody looked.
    """

    heartbeat: Heartbeat
    collectives: list[Collective] | None = None
    frame: Frame | None = None
    process: str | None = None

    @property
    def pending(self) -> Collective | None:
        """The first collective whose end it did not see."""
        return next((one for one in self.collectives or [] if one.is_pending), None)


@dataclass(frozen=True)
class Hang:
    """A verdict.

    Attributes:
        late: ranks that the others waited for; empty where that cannot be told.
        collective: what the others waited in.
        reason: one sentence.
    """

    late: tuple[int, ...]
    collective: Collective | None
    reason: str


def read_traces(log_dir: Path) -> dict[int, Traces]:
    """What the ranks of an attempt left, by rank."""
    processes = read_alarm(log_dir).get("processes", {})
    return {
        rank: Traces(
            heartbeat,
            read_collectives(log_dir, rank),
            innermost(read_stack(log_dir, rank, heartbeat.main_thread)),
            processes.get(str(rank)),
        )
        for rank, heartbeat in read_heartbeats(log_dir).items()
        if heartbeat.state != "ended"
    }


def read_alarm(log_dir: Path) -> dict[str, dict[str, str]]:
    """What whoever saw the hang first noted; empty where nobody has seen one."""
    try:
        alarm: dict[str, dict[str, str]] = json.loads((log_dir / ALARM_NAME).read_text())
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
        return Hang((), None, disagreement)
    late = _late(traces, waiting)
    waited_in = {rank: collective for rank, collective in waiting.items() if rank not in late}
    rest = _describe_rest(traces, waited_in, late)
    if late:
        reason = f"{'; '.join(_describe_late(traces[rank]) for rank in late)}{rest}"
    else:
        reason = f"no rank went on, and none of them was behind the others{rest}"
    return Hang(late, next(iter(waited_in.values()), None), reason + ".")


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
    return f"{place} {stood} {moment}, after {beat.in_phase_s:.1f} s there (deadline {beat.allowance_s:.1f} s){state}"


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
