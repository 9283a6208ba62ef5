"""Starting the ranks of one machine and seeing them through to the end, whatever that is."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from sharding.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED
from sharding.process_lifetime import LAUNCHER_PID_VARIABLE
from trainer.run_folder import RunFolder
from trainer.stopping import request_stop

EXIT_INTERRUPTED = 130
_POLL_EVERY_S = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# torchrun's report of the first failure: "rank      : 1 (local_rank: 1)" and "exitcode  : -9 (pid: 123)".
_ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", re.DOTALL)


@dataclass
class _Interruptions:
    """Signals that reached the launcher."""

    count: int = 0

    def add(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def run_ranks(
    command: Sequence[str], variables: dict[str, str], run_folder: RunFolder, attempt: int, lease_token: str
) -> int:
    """Run an agent and its ranks to the end.

    The first signal asks the run to save and stop, a second one ends it at once. Nothing is left running, also when
    this process itself is killed: the agent ends with it, and the ranks end with the agent.

    Args:
        command: the agent's argv.
        variables: what to add to the environment.
        run_folder: the run's folder.
        attempt: number of the attempt.
        lease_token: proof for the ranks that the folder is theirs; also marks their processes.

    Returns:
        The exit status of the run.
    """
    log = run_folder.log_dir(attempt) / "launcher.log"
    environment = os.environ | variables | {
        "SHARDLINE_LEASE": lease_token,
        "SHARDLINE_ATTEMPT": str(attempt),
        LAUNCHER_PID_VARIABLE: str(os.getpid()),
    }
    interruptions = _Interruptions()
    previous = {number: signal.signal(number, interruptions.add) for number in _SIGNALS}
    try:
        with log.open("ab") as stderr:
            # A session of its own: Ctrl-C on the terminal must reach the launcher alone, or torchrun would end its
            # ranks before they have saved.
            agent = subprocess.Popen(
                [sys.executable, "-m", "launcher.child", *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        ended_by_force = _wait(agent, interruptions, run_folder, lease_token)
    finally:
        kill_marked(lease_token)
        for number, handler in previous.items():
            signal.signal(number, handler)
    if ended_by_force:
        _overwrite_outcome(run_folder, "failed", EXIT_INTERRUPTED, "ended at once by a second signal")
        print("error: ended at once by a second signal; the next run continues from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    return _conclude(agent.returncode, run_folder, log)


def _wait(agent: subprocess.Popen[bytes], interruptions: _Interruptions, run_folder: RunFolder, token: str) -> bool:
    """Wait for the agent; returns whether a second signal ended it."""
    asked = False
    while agent.poll() is None:
        if interruptions.count and not asked:
            asked = True
            request_stop(run_folder.stop_file, "signal to the launcher")
            print("\nstopping: the current step is finished and saved; press Ctrl-C again to end at once", flush=True)
        if interruptions.count > 1:
            kill_marked(token)
            agent.wait()
            return True
        time.sleep(_POLL_EVERY_S)
    return False


def kill_marked(token: str) -> None:
    """Kill every process that was started with this lease's token in its environment, wherever it hangs in the tree."""
    marker = f"SHARDLINE_LEASE={token}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if marker in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            # It ended meanwhile, or belongs to another user and so is none of ours.
            continue


def _conclude(agent_status: int, run_folder: RunFolder, log: Path) -> int:
    """Say how the run ended, the failing rank's own error last, and return the exit status."""
    outcome = run_folder.read_outcome()
    killed = _killed_rank(log)
    if killed is not None:
        # The others' errors, such as a closed connection, are consequences.
        rank, reason = killed
        step = outcome["step"] if outcome is not None else 0
        _overwrite_outcome(run_folder, "failed", EXIT_FAILED, reason, rank, step)
        outcome = run_folder.read_outcome()
    if outcome is None:
        last_line = _last_line(log) or f"the launcher's agent ended with status {agent_status}"
        _overwrite_outcome(run_folder, "failed", EXIT_FAILED, last_line)
        outcome = run_folder.read_outcome()
    assert outcome is not None
    exit_code = int(outcome["exit_code"])
    if exit_code == EXIT_FINISHED:
        print(f"finished at step {outcome['step']}: {run_folder.path}")
    elif exit_code == EXIT_STOPPED:
        print(f"stopped at step {outcome['step']}, saved; run the same command again to continue")
    else:
        _print_failure(outcome["reason"], outcome.get("rank"), exit_code, log)
    return exit_code


def _print_failure(reason: str, rank: int | None, exit_code: int, log: Path) -> None:
    if rank is None:
        print(f"error: {reason}", file=sys.stderr)
    elif exit_code == EXIT_FAILED:
        rank_log = log.with_name(f"rank-{rank}.log")
        print(f"logs: {rank_log if rank_log.exists() else log}", file=sys.stderr)
        print(f"error: rank {rank}: {reason}", file=sys.stderr)
    else:
        print(f"error: {reason}", file=sys.stderr)


def _killed_rank(log: Path) -> tuple[int, str] | None:
    """The rank whose death by a signal torchrun saw first, if that is what happened."""
    match = _ROOT_CAUSE.search(log.read_text(errors="replace"))
    if match is None or int(match.group(2)) >= 0:
        return None
    number = -int(match.group(2))
    name = signal.Signals(number).name if number in signal.Signals._value2member_map_ else f"signal {number}"
    hint = "; the kernel does that when memory runs out" if number == signal.SIGKILL else ""
    return int(match.group(1)), f"the process was killed by {name}{hint}"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"^[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or [""])[-1]


def _overwrite_outcome(
    run_folder: RunFolder, status: str, exit_code: int, reason: str, rank: int | None = None, step: int = 0
) -> None:
    run_folder.outcome_file.unlink(missing_ok=True)
    run_folder.write_outcome(status, exit_code, step, reason, rank)
