"""Starting the ranks of one machine and seeing them through to the end, whatever that is."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from launcher.child import start_child
from launcher.conclusion import Findings, conclude, conclude_by_force
from launcher.hang_watch import HangWatch
from launcher.oom_evidence import OomWatch
from launcher.rank_exits import RankExits
from launcher.stop_signals import StopSignals
from sharding.ranks.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED
from sharding.ranks.sentences import print_error, print_warning
from trainer.faults.hang.rank_progress import ProgressMemory, read_progress
from trainer.run_folder.folder import RunFolder
from trainer.runtime.processes import ATTEMPT_VARIABLE, LEASE_VARIABLE

_POLL_EVERY_S = 0.1
_LOOK_EVERY_S = 0.5
# Short, since what others still write after a rank has failed is of that failure; agents alone would give them 30 s.
_GRACE_AFTER_FAILURE_S = 5.0
_KILL_WITHIN_S = 5.0
# What torch's agent, also Accelerate's, logs when it ends the remaining ranks.
_CLOSING_LINE = b"closing signal SIGTERM"


class _FailureWatch:
    """Whether a rank has failed: it said so, or was seen to end so, or torch's agent ends the others unasked."""

    def __init__(self, run_folder: RunFolder, agent_log: BinaryIO, exits: RankExits) -> None:
        self._run_folder = run_folder
        self._agent_log = agent_log
        self._exits = exits
        self._last_read = b""
        self._is_closing = False

    def has_failed(self) -> bool:
        # The line may have been half written at the last look.
        self._last_read = self._last_read[-len(_CLOSING_LINE) :] + self._agent_log.read()
        self._is_closing = self._is_closing or _CLOSING_LINE in self._last_read
        outcome = self._run_folder.read_outcome()
        if outcome is not None:
            return outcome["exit_code"] not in (EXIT_FINISHED, EXIT_STOPPED)
        if self._exits.first_failure is not None:
            return True
        return self._is_closing and not self._run_folder.stop_file.exists()


def run_ranks(
    launcher: str,
    command: Sequence[str],
    variables: Mapping[str, str],
    run_folder: RunFolder,
    attempt: int,
    lease_token: str,
    signals: StopSignals,
) -> int:
    """Run an agent and its ranks to the end.

    The first signal asks the run to save and stop, a second one ends it at once. Nothing is left running, also when
    this process itself is killed: the agent ends with it, and the ranks end with the agent.

    Args:
        launcher: the launcher's name, to speak of its agent.
        command: the agent's argv.
        variables: what to add to the environment.
        run_folder: the run's folder.
        attempt: number of the attempt.
        lease_token: proof for the ranks that the folder is theirs; also marks their processes.
        signals: those that reach this process.

    Returns:
        The exit status of the run.
    """
    log = run_folder.log_dir(attempt) / "launcher.log"
    marks = {LEASE_VARIABLE: lease_token, ATTEMPT_VARIABLE: str(attempt)}
    try:
        with log.open("ab") as stderr:
            oom, progress = OomWatch(), ProgressMemory()
            environment = {**os.environ, **variables, **marks, **progress.variables}
            agent = start_child(command, environment, shielded=True, stderr=stderr)
        exits = RankExits(agent.pid)
        with log.open("rb") as agent_log, contextlib.closing(exits):
            hangs = HangWatch(run_folder, log.parent, progress.variables)
            ended_by_force = _wait(agent, agent_log, exits, hangs, oom, signals, run_folder, lease_token)
        findings = Findings(exits, oom, read_progress(progress.variables))
        progress.close()
    finally:
        kill_marked(lease_token)
    if run_folder.is_taken_over:
        # The outcome is the new owner's to write.
        print_error(f"run folder {run_folder.path} was taken over by another process; see {log}")
        return EXIT_FAILED
    if ended_by_force:
        return conclude_by_force(run_folder)
    return conclude(f"{launcher}'s agent", agent.returncode, findings, run_folder, log)


def kill_marked(token: str, *, spared_pid: int | None = None) -> None:
    """Kill the processes that were started with this lease's token, wherever they hang in the tree, and see them gone.

    Args:
        token: the lease's.
        spared_pid: the launcher's agent, if it is to stay.
    """
    deadline = time.monotonic() + _KILL_WITHIN_S
    # Again until none is left: a process may have started another while the list was read.
    while pids := list(_marked(token, spared_pid)):
        for pid in pids:
            _send(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            print_warning(f"processes {pids} do not end; they may hang in a driver")
            return
        time.sleep(0.02)


def _wait(
    agent: subprocess.Popen[bytes],
    agent_log: BinaryIO,
    exits: RankExits,
    hangs: HangWatch,
    oom: OomWatch,
    signals: StopSignals,
    run_folder: RunFolder,
    token: str,
) -> bool:
    """Wait for the agent; returns whether a second signal ended it."""
    asked = False
    failures = _FailureWatch(run_folder, agent_log, exits)
    next_look_at = time.monotonic()
    failed_at: float | None = None
    while agent.poll() is None:
        if signals.stop and not asked:
            asked = True
            print("\nstopping after this step and saving; Ctrl-C again ends now", flush=True)
            _ask_ranks_to_stop(run_folder, token, agent.pid)
        if signals.at_once:
            kill_marked(token)
            agent.wait()
            return True
        now = time.monotonic()
        if failed_at is None and now >= next_look_at:
            next_look_at = now + _LOOK_EVERY_S
            oom.look()
            hangs.look(_LOOK_EVERY_S)
            failed_at = now if failures.has_failed() else None
        if failed_at is not None and now > failed_at + _GRACE_AFTER_FAILURE_S:
            # Statuses are recorded no longer, since how ranks end from here on is our doing; the agent sees them end,
            # and ends with its report.
            exits.close()
            hangs.keep_stacks()
            kill_marked(token, spared_pid=agent.pid)
        exits.wait(_POLL_EVERY_S)
    return False


def _ask_ranks_to_stop(run_folder: RunFolder, token: str, agent_pid: int) -> None:
    try:
        run_folder.request_stop("signal to the launcher")
    except OSError:
        # As on a full disk; ranks that are up are asked the same by a signal.
        for pid in _marked(token, agent_pid):
            _send(pid, signal.SIGUSR1)


def _marked(token: str, spared_pid: int | None = None) -> Iterator[int]:
    """Processes with this lease's token in their environment, this one left out; a zombie has none."""
    marker = f"{LEASE_VARIABLE}={token}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in (os.getpid(), spared_pid):
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            # It ended meanwhile, or belongs to another user and so is none of ours.
            continue
        if marker in environment:
            yield int(entry.name)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
