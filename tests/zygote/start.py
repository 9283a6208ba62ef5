"""The zygote of a test process."""

import _posixsubprocess
import os
import pickle
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tests.zygote.client import Client
from tests.zygote.request import LENGTH, ROOT, receive

# Arguments and environment of a clone are written where the zygote had its own.
ARGUMENTS_ROOM, ENVIRONMENT_ROOM = "x" * (1 << 15), "x" * (1 << 16)
ROOM_VARIABLE = "SHARDLINE_TEST_ROOM"
_READY_WITHIN_S = 280


class Zygote:
    """A process that clones itself for this one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Start it.

        Args:
            environment: as libraries read it at their import.
        """
        mine, its = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.zygote", str(its.fileno()), ARGUMENTS_ROOM],
            env={ROOM_VARIABLE: ENVIRONMENT_ROOM, **environment, "PYTHONPATH": str(ROOT)},
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
        )
        its.close()
        ready, _, _ = select.select([mine], [], [], _READY_WITHIN_S)
        try:
            assert ready, "it has not imported everything in time"
            receive(mine, LENGTH.size)
        except (AssertionError, EOFError) as error:
            raise RuntimeError("there is no zygote; set SHARDLINE_TESTS_REAL_STARTS=1 to do without") from error
        seen = {os.fsencode(name): os.fsencode(value) for name, value in environment.items()}
        message = pickle.dumps(seen)
        mine.sendall(LENGTH.pack(len(message)) + message)
        self._client = Client(mine, seen)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Within, processes of ours are clones."""
        before: tuple[Callable[..., int], Callable[..., int]]
        before = subprocess._fork_exec, _posixsubprocess.fork_exec
        subprocess._fork_exec = _posixsubprocess.fork_exec = self._client.fork_exec
        try:
            yield
        finally:
            subprocess._fork_exec, _posixsubprocess.fork_exec = before
