"""How a run ended: from what ranks wrote and what their launcher saw to one last line and an exit status."""

import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher.oom_evidence import OomWatch
from launcher.rank_exits import CRASHES, RankExits, RankFailure, root_cause
from sharding.ranks.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, RunFailure, UserError
from sharding.ranks.sentences import print_error, print_warning
from trainer.checkpoint.finish import ALL_STEPS
from trainer.faults.failure.rank_error import is_of_a_peer, read_rank_errors
from trainer.faults.failure.record import FAILURE_TEXT_NAME, Evidence
from trainer.faults.failure.report import ProcessEnd, Sources, write_failure
from trainer.faults.hang.rank_progress import RankProgress
from trainer.faults.hang.verdict import read_verdict
from trainer.run_folder.folder import RunFolder

EXIT_INTERRUPTED = 130
# An entry of torchrun's report, Root Cause or not.
_FAILURE = re.compile(
    r"^ *time *: (?P<time>\S+)\n(?: *host *:.*\n)? *rank *: (?P<rank>\d+) .*\n *exitcode *: (?P<exitcode>-?\d+) ",
    re.MULTILINE,
)
_TIME_FORMAT = "%Y-%m-%d_%H:%M:%S"
_LATE_S = 2.0
_ERROR_LINE = re.compile(r"^(?:error: |[\w.]*(?:Error|Exception|Interrupt)\b)")
_AGENT_ERROR = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError"


@dataclass(frozen=True)
class Findings:
    """What the launcher saw of an attempt.

    Attributes:
        exits: how ranks ended.
        oom: what the kernel said of memory before the ranks started.
        progress: where each rank was last.
    """

    exits: RankExits
    oom: OomWatch
    progress: Mapping[int, RankProgress]


def conclude(agent: str, agent_status: int, findings: Findings, run_folder: RunFolder, log: Path) -> int:
    """Say how the run ended, the failing rank's own error last, and return the exit status.

    Args:
        agent: what to call the launcher's agent.
        agent_status: its exit status, negative for a signal.
        findings: what was seen from outside; the agent's own report of the first failure, where it makes one, goes
            before that, except for a crash: we see it when it happens, the agent when it looks.
        run_folder: the run's folder; its outcome is written here where no rank could.
        log: what the agent and its ranks wrote to standard error.
    """
    first = first_failure(log.read_text(errors="replace"))
    seen = findings.exits.first_failure
    # The end of an agent that was killed is the ranks' end too, and no failure of theirs.
    if seen is not None and agent_status >= 0 and (first is None or -seen.exit_code in CRASHES):
        first = seen
    oom_kill = findings.oom.find(findings.exits.pids.values())
    outcome = run_folder.read_outcome()
    if outcome is None or (read_verdict(log.parent) is None and _is_consequence(outcome, first, log)):
        if outcome is not None:
            print(f"rank {outcome['rank']} reported: {outcome['reason']}", file=sys.stderr)
        outcome = _overwrite_outcome(run_folder, outcome, first, _explain(agent, agent_status, first, log, oom_kill))
    exit_code = int(outcome["exit_code"])
    if exit_code in (EXIT_FINISHED, EXIT_STOPPED):
        # DeepSpeed's agent ends the ranks that are left with SIGTERM as soon as one has ended with 75.
        if first is not None and first.exit_code not in (EXIT_FINISHED, EXIT_STOPPED, -signal.SIGTERM):
            print(f"note: rank {first.rank} {_manner(first.exit_code)} after all was saved; see {log}", file=sys.stderr)
        if exit_code == EXIT_FINISHED:
            if outcome["reason"] != ALL_STEPS:
                print(outcome["reason"])
            print(f"finished at step {outcome['step']}: {run_folder.path}")
        else:
            print(f"stopped at step {outcome['step']}, saved; run the same command again to continue")
    else:
        looked = Evidence(source="the kernel", text=f"looked for OOM kills in {findings.oom.describe()}")
        sources = Sources(
            run_folder.path,
            _attempt(log),
            outcome,
            ends=_ends(findings.exits.ends, first),
            first=first.rank if first is not None else None,
            progress=findings.progress,
            oom_kill=oom_kill,
            evidence=[looked],
        )
        _print_failure(outcome, log, _write_report(sources))
    return exit_code


def conclude_by_force(run_folder: RunFolder) -> int:
    """Say that a second signal ended the run, and return the exit status."""
    outcome = run_folder.read_outcome()
    if outcome is None or outcome["exit_code"] not in (EXIT_FINISHED, EXIT_STOPPED):
        step = saved_step(run_folder)
        run_folder.replace_outcome("failed", EXIT_INTERRUPTED, step, "ended at once by a second signal")
        then = f"the same command continues after step {step}" if step else "nothing was saved yet"
        print_error(f"ended at once by a second signal; {then}")
    return EXIT_INTERRUPTED


def record_crash(run_folder: RunFolder, exits: RankExits) -> None:
    """Write down that a rank of this node was killed, where nobody did or another rank wrote of what followed."""
    outcome, first = run_folder.read_outcome(), exits.first_failure
    if first is None or -first.exit_code not in CRASHES:
        return
    if outcome is None or (outcome["status"] == "failed" and outcome["rank"] != first.rank):
        outcome = _overwrite_outcome(run_folder, outcome, first, f"the process {_manner(first.exit_code)}")
        _write_report(Sources(run_folder.path, run_folder.newest_attempt(), outcome, ends=exits.ends, first=first.rank))


def first_failure(log_text: str) -> RankFailure | None:
    """The first failure in torchrun's report, if it made one.

    Its times are whole seconds, and it calls the lowest rank of a second the first. A rank that raised is dated by
    itself, one that was killed by the agent's next look, so a kill counts as first up to two seconds later.
    """
    failures = [
        (datetime.strptime(found["time"], _TIME_FORMAT).timestamp(), int(found["rank"]), int(found["exitcode"]))
        # The report ends with torchrun's own choice.
        for found in reversed(list(_FAILURE.finditer(log_text)))
    ]
    if not failures:
        return None
    by_time = sorted(failures, key=lambda failure: failure[0])
    first_time, *_ = by_time[0]
    return root_cause([RankFailure(rank, code, time) for time, rank, code in by_time if time - first_time <= _LATE_S])


def _ends(seen: Mapping[int, ProcessEnd], first: RankFailure | None) -> dict[int, ProcessEnd]:
    """How ranks ended, as we saw it; for the first also as the agent reports it, who may have looked before we did."""
    if first is None or first.time is None:
        return dict(seen)
    return {first.rank: ProcessEnd(first.exit_code, first.time), **seen}


def _is_consequence(outcome: dict[str, Any], first: RankFailure | None, log: Path) -> bool:
    """Whether the end of another rank, of which nobody could write, led to the failure that was written down."""
    if first is None or outcome["status"] != "failed" or outcome["rank"] == first.rank:
        return False
    if -first.exit_code in CRASHES:
        return True
    # As the rank wrote it.
    kind, _, message = outcome["reason"].partition(": ")
    return is_of_a_peer(kind, message) and first.rank not in read_rank_errors(log.parent)


def _explain(agent: str, agent_status: int, first: RankFailure | None, log: Path, oom_kill: Evidence | None) -> str:
    if first is None:
        return _last_error(log) or f"{agent} {_manner(agent_status)} without a report"
    own_log = _rank_log(log, first.rank)
    reason = f"the process {_manner(first.exit_code)}"
    if first.exit_code == -signal.SIGKILL:
        if oom_kill is None:
            return f"{reason}, from outside or by the kernel: no trace of the OOM killer was found"
        return f"{reason}; memory had run out: {oom_kill.source} says {oom_kill.text!r}"
    if first.exit_code == -signal.SIGBUS:
        return f"{reason}: a file that it had mapped, such as a shard of the corpus, was cut short or cannot be read"
    error = _last_error(own_log) or _last_error(log)
    return error if error and first.exit_code > 0 else f"{reason}{f' ({error})' if error else ''}"


def _manner(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with status {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"


def _last_error(log: Path) -> str:
    """The last line of a log that names an error; empty where there is none."""
    if not log.exists():
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [line for line in lines if _ERROR_LINE.match(line) and not line.startswith(_AGENT_ERROR)]
    return errors[-1].removeprefix("error: ") if errors else ""


def _overwrite_outcome(
    run_folder: RunFolder, reported: dict[str, Any] | None, first: RankFailure | None, reason: str
) -> dict[str, Any]:
    step = reported["step"] if reported is not None else saved_step(run_folder)
    rank = first.rank if first is not None else None
    run_folder.replace_outcome("failed", EXIT_FAILED, step, reason, rank)
    return {"status": "failed", "exit_code": EXIT_FAILED, "step": step, "reason": reason, "rank": rank}


def saved_step(run_folder: RunFolder) -> int:
    """Step of the newest checkpoint; 0 where there is none, or the storage cannot be asked."""
    try:
        newest = run_folder.newest_checkpoint()
    except (UserError, RunFailure) as error:
        # What is to be said of the run's end does not depend on a storage that cannot be reached.
        print_warning(str(error))
        return 0
    return 0 if newest is None else newest[0]


def _write_report(sources: Sources) -> Path | None:
    """Write failure.json and failure.md; returns the latter."""
    try:
        write_failure(sources)
    except OSError as error:
        print_warning(f"failure.json and failure.md were not written: {error.strerror}")
        return None
    return sources.run_dir / FAILURE_TEXT_NAME


def _print_failure(outcome: dict[str, Any], log: Path, report: Path | None) -> None:
    rank, reason = outcome["rank"], outcome["reason"]
    if outcome["exit_code"] == EXIT_BAD_INPUT:
        print_error(reason)
        return
    own_log = log if rank is None else _rank_log(log, rank)
    print(f"logs: {own_log if own_log.exists() else log}", file=sys.stderr)
    if report is not None:
        print(f"report: {report}", file=sys.stderr)
    # A hang's reason names the rank itself.
    prefix = "" if rank is None or reason.startswith("rank ") else f"rank {rank}: "
    print_error(f"{prefix}{reason}")


def _attempt(log: Path) -> int:
    return int(log.parent.name.rpartition("-")[2])


def _rank_log(log: Path, rank: int) -> Path:
    """Where a rank's standard error goes: rank 0 shares the agent's."""
    return log if rank == 0 else log.with_name(f"rank-{rank}.log")
