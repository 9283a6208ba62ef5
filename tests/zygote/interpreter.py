"""What an interpreter does at its start and end, done by a process that has one."""

import atexit
import ctypes
import faulthandler
import io
import os
import random
import runpy
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import invalidate_caches
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from tests.zygote.request import ROOT, Program

# Without the folder that PYTHONPATH names, which a clone has from its own.
INSTALLED = [folder for folder in sys.path if folder != str(ROOT)]


def set_signals(ignored: Any, blocked: Any) -> None:
    """Those of an interpreter that begins: what was ignored or held back still is."""
    ignored = {signal.SIGPIPE, signal.SIGXFSZ, *ignored}
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with suppress(OSError):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    if signal.SIGINT not in ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def set_identity(program: Program, environment: Mapping[bytes, bytes]) -> None:
    """Arguments, environment, import path, streams and random numbers, as an interpreter sets them."""
    os.environb.clear()
    os.environb.update(environment)
    write_areas(list(map(os.fsencode, program.arguments)), environment)
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    is_safe = "-P" in program.flags or bool(os.environ.get("PYTHONSAFEPATH"))
    sys.path[:] = [*([] if is_safe else [os.getcwd()]), *folders, *INSTALLED]
    invalidate_caches()
    sys.orig_argv = list(program.arguments)
    is_unbuffered = "-u" in program.flags or bool(os.environ.get("PYTHONUNBUFFERED"))
    source, out, errors = (io.FileIO(number, mode, closefd=False) for number, mode in enumerate(("rb", "wb", "wb")))
    sys.stdin = _text(io.BufferedReader(source))
    sys.stdout = _text(
        out if is_unbuffered else io.BufferedWriter(out), line_buffering=os.isatty(1), write_through=is_unbuffered
    )
    sys.stderr = _text(io.BufferedWriter(errors), errors="backslashreplace", line_buffering=True)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable(2)
    if threads := os.environ.get("OMP_NUM_THREADS"):
        sys.modules["torch"].set_num_threads(int(threads))


def _text(stream: Any, **options: Any) -> Any:
    return io.TextIOWrapper(stream, encoding="utf-8", **options)


def write_areas(arguments: Sequence[bytes], environment: Mapping[bytes, bytes]) -> None:
    """What /proc/PID/cmdline and /proc/PID/environ show."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    starts_and_ends = list(map(int, fields[45:49]))
    entries = [name + b"=" + value for name, value in environment.items()]
    for strings, start, end in ((arguments, *starts_and_ends[:2]), (entries, *starts_and_ends[2:])):
        size = end - start
        text = b"".join(string + b"\0" for string in strings)
        ctypes.memmove(start, text[: size - 1].ljust(size, b"\0"), size)


def run(program: Program) -> NoReturn:
    """Run a program, and end as an interpreter does."""
    sys.modules["__main__"] = ModuleType("__main__")
    status = 1
    try:
        if program.code:
            sys.argv = ["-c", *program.rest]
            exec(program.code, sys.modules["__main__"].__dict__)
        else:
            # A package stays; a module would be found to be there before it begins, as would one that it runs in turn.
            for name in [name for name in sys.modules if name in (program.module, *program.rest[:2])]:
                if not hasattr(sys.modules[name], "__path__"):
                    del sys.modules[name]
            sys.argv = ["-m", *program.rest]
            runpy._run_module_as_main(program.module)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        # What comes after our own frame are an interpreter's.
        tail = error.__traceback__ and error.__traceback__.tb_next
        sys.excepthook(type(error), error.with_traceback(tail), tail)
        if isinstance(error, KeyboardInterrupt):
            status = -signal.SIGINT
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)
