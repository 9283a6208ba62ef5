"""The process that asks a zygote for others."""

import _posixsubprocess
import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tests.zygote.interpreter import run, set_identity, set_signals
from tests.zygote.request import Request, is_like_zygotes, read_program, send

_fork_exec = _posixsubprocess.fork_exec
_exec = os.execve


class Client:
    """The process that asks a zygote for others, in place of the system's fork and exec."""

    def __init__(self, connection: socket.socket, environment: Mapping[bytes, bytes]) -> None:
        self._connection = connection
        self._environment = environment
        self._pid = os.getpid()
        self._session = os.getsid(0)
        self._lock = threading.Lock()

    def fork_exec(self, *arguments: Any) -> int:
        """Stands in for ``_posixsubprocess.fork_exec``."""
        pid = self._ask(*arguments) if os.getpid() == self._pid and os.getsid(0) == self._session else 0
        return pid or _fork_exec(*arguments)

    def _ask(
        self, argv: Any, executables: Any, close_fds: bool, kept: Any, folder: Any, environment: Any, *arguments: Any
    ) -> int:
        """The process id; 0 where it has to be a real start."""
        reads, _, _, writes, _, errors, _, error_pipe, _, session, group, *others = arguments
        program = read_program(argv)
        if program is None or not close_fds or any(value not in (None, -1) for value in others[:5]):
            return 0
        items = os.environb.items() if environment is None else (entry.split(b"=", 1) for entry in environment)
        variables = dict(items)
        folder = os.fsdecode(folder or os.getcwd())
        if not is_like_zygotes(variables, self._environment) or not os.path.isdir(folder):
            return 0
        passed = [number for number in kept if number != error_pipe]
        streams = [number if given == -1 else given for number, given in enumerate((reads, writes, errors))]
        request = Request(
            program,
            variables,
            folder,
            [0, 1, 2, *passed],
            list(ignored()),
            list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
            bool(session),
            os.getpgid(0) if group == -1 else group,
        )
        # An interrupt between question and answer would leave the answer to the next who asks.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            with self._lock:
                return send(self._connection, request, [*streams, *passed])
        except (OSError, EOFError):
            return 0
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def execve(self, path: Any, argv: Any, environment: Any) -> NoReturn:
        """Stands in for ``os.execve``: this process becomes the program, without a new interpreter."""
        program = read_program(list(argv))
        variables = {os.fsencode(name): os.fsencode(value) for name, value in environment.items()}
        alone = os.getpid() == self._pid and len(os.listdir("/proc/self/task")) == 1
        if program is None or not alone or not is_like_zygotes(variables, self._environment):
            _exec(path, argv, environment)
        assert program is not None
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        for number in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):
                if number > 2 and number != self._connection.fileno() and not os.get_inheritable(number):
                    os.close(number)
        set_signals(ignored(), signal.pthread_sigmask(signal.SIG_BLOCK, []))
        atexit._clear()
        set_identity(program, variables)
        run(program)


def ignored() -> Iterator[int]:
    (mask,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "SigIgn" in line)
    return (number for number in signal.valid_signals() if int(mask, 16) >> (number - 1) & 1)


def install(connection: socket.socket, of_zygote: Mapping[bytes, bytes]) -> None:
    """Ask the zygote from here on."""
    client = Client(connection, of_zygote)
    _posixsubprocess.fork_exec = client.fork_exec
    subprocess._fork_exec = client.fork_exec
    os.execve = client.execve  # type: ignore[assignment]
    os.execv = lambda path, argv: client.execve(path, argv, os.environ)  # type: ignore[assignment]
