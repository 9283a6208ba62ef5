"""One writer per run folder: a lease with host, process, token and heartbeat."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sharding.errors import RunFailure, UserError
from trainer.atomic_files import write_atomically

HEARTBEAT_EVERY_S = 10.0
STALE_AFTER_S = 60.0


class Lease:
    """The right to write to one run folder, kept alive by a thread until released."""

    def __init__(self, folder: Path, token: str) -> None:
        """Use ``acquire`` or ``attach``."""
        self._path = folder / "lease.json"
        self._token = token
        self._released = threading.Event()

    @property
    def token(self) -> str:
        """What proves that this lease is the one in the folder."""
        return self._token

    @classmethod
    def acquire(cls, folder: Path) -> "Lease":
        """Become the folder's writer; creates the folder.

        Raises:
            UserError: another live process is its writer.
        """
        folder.mkdir(parents=True, exist_ok=True)
        lease = cls(folder, secrets.token_hex(8))
        with _exclusive(folder):
            holder = _read(lease._path)
            if holder is not None and _is_alive(holder):
                age_s = time.time() - holder["heartbeat"]
                raise UserError(
                    f"run folder {folder} is in use by process {holder['pid']} on {holder['host']} (last sign of life "
                    f"{age_s:.0f} s ago); wait for it, stop it with `touch {folder}/stop`, or choose another name."
                )
            lease._write()
        threading.Thread(target=lease._keep_alive, name="lease-heartbeat", daemon=True).start()
        return lease

    @classmethod
    def attach(cls, folder: Path, token: str) -> "Lease":
        """Check against a lease that the launcher holds and keeps alive."""
        return cls(folder, token)

    def check(self) -> None:
        """Assert that the folder is still ours.

        Raises:
            RunFailure: another process has taken it over.
        """
        holder = _read(self._path)
        if holder is None or holder["token"] != self._token:
            who = "nobody" if holder is None else f"process {holder['pid']} on {holder['host']}"
            raise RunFailure(f"run folder {self._path.parent} was taken over: its lease is held by {who}; nothing was saved.")

    def release(self) -> None:
        """Stop being the writer; does nothing where the lease is attached, lost or released already."""
        self._released.set()
        with contextlib.suppress(OSError), _exclusive(self._path.parent):
            holder = _read(self._path)
            if holder is not None and holder["token"] == self._token and holder["pid"] == os.getpid():
                self._path.unlink()

    def _write(self) -> None:
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": _process_start(os.getpid()),
            "token": self._token,
            "heartbeat": time.time(),
        }
        write_atomically(self._path, json.dumps(holder))

    def _keep_alive(self) -> None:
        while not self._released.wait(HEARTBEAT_EVERY_S):
            # A full disk or a file system that is away for a moment must not end the run; the next beat may succeed.
            with contextlib.suppress(OSError), _exclusive(self._path.parent):
                holder = _read(self._path)
                if holder is None or holder["token"] != self._token or self._released.is_set():
                    return
                self._write()


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock file, so that two processes never both see it free."""
    descriptor = os.open(folder / ".lease.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _is_alive(holder: dict[str, Any]) -> bool:
    """On this host the process itself tells; of another host only the heartbeat does."""
    if holder["host"] == socket.gethostname():
        return _process_start(holder["pid"]) == holder["process_started"]
    return time.time() - holder["heartbeat"] < STALE_AFTER_S


def _process_start(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot, which tells it from a later one with the same id."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name in parentheses may itself hold spaces and parentheses. A zombie is not alive.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
