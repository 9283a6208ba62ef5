"""What tests/test_zygote.py starts: it says what it sees of itself, and does what it reads."""

import os
import signal
import subprocess
import sys
import threading

from sharding.ranks.process_lifetime import die_with_parent


def _mask(name: str) -> list[int]:
    with open("/proc/self/status") as file:
        (mask,) = (int(line.split()[1], 16) for line in file if line.startswith(name))
    return [number for number in range(1, 32) if mask >> (number - 1) & 1]


def _descriptors() -> list[int]:
    """Those that are open; of a clone without its way to its zygote."""
    return [number for number in range(250) if _is_open(number)][: None if not _is_clone() else 3]


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _is_clone() -> bool:
    return "torch" in sys.modules


def _say() -> None:
    facts = {
        "pid": os.getpid(),
        "tid": threading.get_native_id(),
        "parent": os.getppid(),
        "folder": os.getcwd(),
        "SUBJECT": os.environ.get("SUBJECT"),
        "first": sys.argv[1],
        "argument": sys.argv[-1],
        "name": __name__,
        "path": sys.path[:3],
        "ignores": _mask("SigIgn"),
        "handles": _mask("SigCgt"),
        "descriptors": _descriptors(),
        "is_clone": _is_clone(),
    }
    print(*(f"{name}={value}" for name, value in facts.items()), "end", sep="\n")


def _obey(order: str) -> None:
    name, _, argument = order.partition(" ")
    command = [sys.executable, "-u", "-m", "tests.zygote_subject", "again", str(_is_clone())]
    if name == "exit":
        sys.exit(int(argument) if argument else None)
    elif name == "sentence":
        sys.exit("a sentence")
    elif name == "raise":
        raise ZeroDivisionError("it did")
    elif name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "abort":
        os.abort()
    elif name == "child":
        subprocess.Popen(command, env={**os.environ, "SUBJECT": "two"}, stdin=subprocess.PIPE)
    elif name == "exec":
        signal.signal(signal.SIGTERM, lambda *_: None)
        os.execve(command[0], command, {**os.environ, "SUBJECT": "three"})


if __name__ == "__main__":
    if os.environ.get("SUBJECT") == "two":
        die_with_parent()
    _say()
    for line in sys.stdin:
        _obey(line.rstrip("\n"))
