"""One writer per run folder: a lease with host, process, attempt, token and heartbeat."""

import contextlib
import errno
import fcntl
import json
import logging
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

LEASE_VARIABLE = "SHARDLINE_LEASE"
ATTEMPT_VARIABLE = "SHARDLINE_ATTEMPT"
HEARTBEAT_EVERY_S = 10.0
STALE_AFTER_S = 60.0
_FIELDS = frozenset({"host", "process_space", "pid", "process_started", "attempt", "token", "heartbeat"})
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)

_log = logging.getLogger("shardline")


class Lease:
    """The right to write to one run folder, kept alive by a thread until released."""

    def __init__(self, folder: Path, token: str) -> None:
        """Use ``acquire`` or ``attach``."""
        self._folder = folder
        self._path = folder / "lease.json"
        self._token = token
        self._released = threading.Event()

    @property
    def token(self) -> str:
        """What proves that this lease is the one in the folder."""
        return self._token

    @classmethod
    def acquire(cls, folder: Path) -> "Lease":
        """Become the folder's writer; creates the folder. A holder that is gone is replaced, and a warning says so.

        Raises:
            UserError: another live process is its writer, or the folder cannot be written.
        """
        lease = cls(folder, secrets.token_hex(8))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _exclusive(folder):
                holder = _read(lease._path)
                if holder is not None and _is_alive(holder):
                    raise UserError(_refusal(folder, holder))
                write_atomically(lease._path, json.dumps(_new_holder(lease._token)))
        except OSError as error:
            raise UserError(
                f"run folder {folder} cannot be written: {error.strerror}; choose another output_dir."
            ) from None
        if holder is not None:
            _log.warning("taking over run folder %s from %s, which is gone", folder, _describe(holder))
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
            who = "nobody" if holder is None else _describe(holder)
            raise RunFailure(
                f"run folder {self._folder} was taken over: its lease is held by {who}; nothing was saved."
            )

    def release(self) -> None:
        """Stop being the writer; does nothing where the lease is attached, lost or released already."""
        self._released.set()
        with contextlib.suppress(OSError), _exclusive(self._folder):
            holder = _read(self._path)
            if holder is not None and holder["token"] == self._token and holder["pid"] == os.getpid():
                self._path.unlink()

    def _keep_alive(self) -> None:
        while not self._released.wait(HEARTBEAT_EVERY_S):
            # A full disk or a file system that is away for a moment must not end the run; the next beat may succeed.
            with contextlib.suppress(OSError), _exclusive(self._folder):
                holder = _read(self._path)
                if holder is None or holder["token"] != self._token or self._released.is_set():
                    return
                write_atomically(self._path, json.dumps(holder | {"heartbeat": time.time()}))


def is_taken_over(folder: Path, token: str | None) -> bool:
    """Whether the folder's writer is now another than the one with this token; never where no token was handed over."""
    holder = _read(folder / "lease.json")
    return token is not None and holder is not None and holder["token"] != token


def record_attempt(folder: Path, attempt: int) -> None:
    """Let the folder's lease, if there is one, say which attempt it is held for."""
    path = folder / "lease.json"
    with _exclusive(folder):
        holder = _read(path)
        if holder is not None:
            write_atomically(path, json.dumps(holder | {"attempt": attempt}))


def _new_holder(token: str) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process_space": process_space(),
        "pid": os.getpid(),
        "process_started": _process_start(os.getpid()),
        "attempt": None,
        "token": token,
        "heartbeat": time.time(),
        "slurm_job": _slurm_job(),
    }


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    age_s = max(0.0, time.time() - holder["heartbeat"])
    return (
        f"run folder {folder} is in use by {_describe(holder)} (last sign of life {age_s:.0f} s ago); wait for it, "
        f"stop it with `touch {folder}/stop`, or choose another name."
    )


def _describe(holder: dict[str, Any]) -> str:
    attempt = f", attempt {holder['attempt']}" if holder["attempt"] else ""
    return f"process {holder['pid']} on {holder['host']}{attempt}"


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock file, so that two processes never both see it free."""
    descriptor = os.open(folder / ".lease.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            # Some cluster file systems are mounted without locks; the token, checked at each commit, is what remains.
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        holder = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return holder if isinstance(holder, dict) and holder.keys() >= _FIELDS else None


def _is_alive(holder: dict[str, Any]) -> bool:
    """Where its process can be seen, the process itself tells; elsewhere the batch system, or else the heartbeat."""
    if holder["process_space"] == process_space():
        return _process_start(holder["pid"]) == holder["process_started"]
    own_job, its_job = _slurm_job(), holder.get("slurm_job")
    if own_job and its_job and own_job[0] == its_job[0] and own_job[1] > its_job[1]:
        # Slurm starts a job again when no process of its last start is left, or the node is dead.
        return False
    return time.time() - holder["heartbeat"] < STALE_AFTER_S


def process_space() -> str:
    """What process ids refer to: this boot of this kernel, and the container. A host name does not tell that."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _slurm_job() -> list[int] | None:
    """Number of this Slurm job and how often it was started again; None outside of one."""
    job, restarts = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
    return [int(job), int(restarts)] if job.isdigit() and restarts.isdigit() else None


def _process_start(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot, which tells it from a later one with the same id."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name in parentheses may itself hold spaces and parentheses. A zombie is not alive.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
