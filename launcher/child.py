"""A child of the launcher that ends with it: ``python -m launcher.child [--shielded] COMMAND ...`` becomes COMMAND."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sharding.process_lifetime import LAUNCHER_PID_VARIABLE, die_with_parent

_SHIELDED = "--shielded"
_SHIELDED_FROM = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def start_child(
    command: Sequence[str], environment: Mapping[str, str], *, shielded: bool, **options: Any
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own that ends with this process, also if this process is killed.

    Call it from the main thread: the kernel takes the end of the thread that started a child for its parent's end.

    Args:
        command: argv.
        environment: the child's whole environment.
        shielded: whether it ignores the signals that ask a run to stop. Ranks take them up again; torchrun's agent
            would end its ranks before they have saved.
        options: further arguments of ``subprocess.Popen``.
    """
    # A session of its own, since a Ctrl-C on the terminal must reach the launcher alone.
    return subprocess.Popen(
        [sys.executable, "-m", "launcher.child", *([_SHIELDED] if shielded else []), *command],
        env={**environment, LAUNCHER_PID_VARIABLE: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        **options,
    )


def _become(arguments: Sequence[str]) -> None:
    # Done here and not between fork and exec in the parent, which has threads by then. The settings survive exec.
    die_with_parent()
    shielded = arguments[0] == _SHIELDED
    if shielded:
        for number in _SHIELDED_FROM:
            signal.signal(number, signal.SIG_IGN)
    command = arguments[1:] if shielded else arguments
    os.execvp(command[0], list(command))  # noqa: S606 - no shell is what we want


if __name__ == "__main__":
    _become(sys.argv[1:])
