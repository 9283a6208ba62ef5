"""``failure.md``: a failure for people."""

import time

from trainer.faults.failure.record import Failure, RankState


def describe_failure(failure: Failure) -> str:
    """The report as Markdown."""
    who = f"rank {failure.rank}" if failure.rank is not None else "no single rank"
    facts = [
        ("what", f"{failure.kind}"),
        ("who", who),
        ("when", _when(failure.time)),
        ("doing what", _doing(failure)),
        ("where", failure.where or "unknown"),
        *([("the others waited in", failure.collective)] if failure.collective else []),
        ("remedy", failure.remedy or "none is known"),
        ("signature", f"`{failure.signature}`"),
    ]
    lines = [f"# Attempt {failure.attempt} failed: {failure.kind}", "", failure.reason, ""]
    lines += [f"- {name}: {value}" for name, value in facts]
    lines += ["", "## Ranks", "", "| rank | role | host | step | phase | collective | where | end | peak RSS |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    lines += [_row(state) for state in failure.ranks]
    lines += ["", "## Evidence", ""]
    for one in failure.evidence:
        lines += [f"{one.source}:", "", *(f"    {line}" for line in one.text.splitlines()), ""]
    lines += ["## Logs", "", *(f"- {log}" for log in failure.logs)]
    return "\n".join(lines) + "\n"


def _when(seconds: float | None) -> str:
    return "unknown" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))


def _doing(failure: Failure) -> str:
    return "unknown" if failure.phase is None else f"phase {failure.phase} of step {failure.step}"


def _row(state: RankState) -> str:
    phase = None if state.phase is None else f"{state.phase}, {state.in_phase_s:.1f} s"
    memory = None if state.peak_rss_gib is None else f"{state.peak_rss_gib:.2f} GiB"
    cells = [state.rank, state.role, state.host, state.step, phase, state.collective, state.where, state.exit, memory]
    return f"| {' | '.join('unknown' if cell is None else str(cell).replace('|', '/') for cell in cells)} |"
