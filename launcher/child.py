"""A child of the launcher that ends with it: ``python -m launcher.child [--shielded] COMMAND ...`` becomes COMMAND."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.import_path import import_variables, module_command
from sharding.ranks.process_lifetime import LAUNCHER_PID_VARIABLE, die_with_parent

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
        shielded: whether the signals that ask a run to stop are held back from it. Ranks let them through again; a
            launcher's agent would end its ranks before they have saved.
        options: further arguments of ``subprocess.Popen``.
    """
    # A session of its own, since a Ctrl-C on the terminal must reach the launcher alone.
    return subprocess.Popen(
        module_command("launcher.child", *([_SHIELDED] if shielded else []), *command),
        env={**environment, **import_variables(environment), LAUNCHER_PID_VARIABLE: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        **options,
    )


def _become(arguments: Sequence[str]) -> None:
    # Done here since between fork and exec the parent has threads; the settings survive exec.
    die_with_parent()
    shielded = arguments[0] == _SHIELDED
    if shielded:
        # Held back rather than ignored: the agents of DeepSpeed and Accelerate set handlers of their own.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED_FROM)
    command = arguments[1:] if shielded else arguments
    os.execvp(command[0], list(command))  # noqa: S606 - no shell is what we want


if __name__ == "__main__":
    _become(sys.argv[1:])
