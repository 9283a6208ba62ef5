"""A process that clones itself, and what its clones do before they are what was asked for."""

import ctypes
import fcntl
import os
import pickle
import platform
import re
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NoReturn

from tests.zygote.client import install
from tests.zygote.interpreter import run, set_identity, set_signals, write_areas
from tests.zygote.request import LENGTH, Request, receive

# A rank starts no Python.
_STARTS_NOTHING = re.compile(r"trainer$|.*\.rank$")
_CLONE_PARENT, _CLONE_CHILD_CLEARTID, _CLONE_CHILD_SETTID = 0x8000, 0x200000, 0x1000000
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}.get(platform.machine())
_PR_SET_PDEATHSIG, _PR_GET_TID_ADDRESS = 1, 40
_HIGH_DESCRIPTOR = 500
# It keeps the GIL, which a clone must hold as well.
_libc = ctypes.PyDLL(None)


def serve(connection: socket.socket, of_zygote: Mapping[bytes, bytes]) -> NoReturn:
    """Clone this process whenever it is asked to, until nobody is left who could ask."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
        with suppress(OSError):
            signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            header, descriptors, _, _ = socket.recv_fds(connection, LENGTH.size, 64)
            (size,) = LENGTH.unpack(header + receive(connection, LENGTH.size - len(header)))
            request = pickle.loads(receive(connection, size))
        except EOFError:
            os._exit(0)
        pid = _clone()
        if pid == 0:
            connection.close()
            become(request, descriptors, of_zygote)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(LENGTH.pack(max(pid, 0)))


def _clone() -> int:
    """A copy of this process whose parent is this one's: its process id, 0 in the copy.

    As fork of the C library, which writes the thread's id where it keeps it.
    """
    address = ctypes.c_void_p()
    _libc.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(address), 0, 0, 0)
    if _SYS_CLONE is None or not address.value:
        return -1
    flags = _CLONE_PARENT | _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID | signal.SIGCHLD
    places = (0, address.value) if platform.machine() == "x86_64" else (0, 0, address.value)
    ctypes.pythonapi.PyOS_BeforeFork()
    pid: int = _libc.syscall(_SYS_CLONE, flags, 0, *map(ctypes.c_void_p, places))
    (ctypes.pythonapi.PyOS_AfterFork_Child if pid == 0 else ctypes.pythonapi.PyOS_AfterFork_Parent)()
    return pid


def become(request: Request, descriptors: Sequence[int], of_zygote: Mapping[bytes, bytes]) -> NoReturn:
    """Be the process that was asked for."""
    if request.session:
        os.setsid()
    else:
        os.setpgid(0, request.group)
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _HIGH_DESCRIPTOR) for descriptor in descriptors]
    for source, target in zip(high, request.descriptors, strict=True):
        os.dup2(source, target)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number not in request.descriptors:
            with suppress(OSError):
                os.close(number)
    os.chdir(request.folder)
    set_identity(request.program, request.environment)
    if not _STARTS_NOTHING.match(request.program.module):
        install(start_own_zygote(of_zygote), of_zygote)
    set_signals(request.ignored, request.blocked)
    run(request.program)


def start_own_zygote(of_zygote: Mapping[bytes, bytes]) -> socket.socket:
    """A copy of this process that has run nothing, as its child; returns the way to it."""
    mine, its = socket.socketpair()
    if os.fork():
        its.close()
        return mine
    mine.close()
    parent = os.getppid()
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)
    # Nobody who looks for a run's processes shall find it.
    write_areas([b"zygote"], {})
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.close(nothing)
    serve(its, of_zygote)
