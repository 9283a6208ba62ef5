"""One writer per run folder: a lease with host, process, attempt, token and heartbeat."""

import contextlib
import json
import logging
import os
import secrets
import threading
import time
from pathlib import Path
from typing import Any

from sharding.ranks.errors import RunFailure, UserError
from trainer.files.atomic_files import write_atomically
from trainer.files.locks import exclusive
from trainer.files.outages import cannot_be_written
from trainer.run_folder.lease_holder import Verdict, describe, judge, new_holder, next_beat

HEARTBEAT_EVERY_S = 10.0
# Of the clock of whoever looks: clocks of two machines are never compared.
STALE_AFTER_S = 60.0
_LOOK_EVERY_S = 0.5
# For so long a file may be missing, or a file system be away, before that means something.
SETTLE_WITHIN_S = 5.0
_FIELDS = frozenset({"host", "process_space", "pid", "process_started", "attempt", "token", "heartbeat"})

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

        Where neither its process nor the batch system can be asked, its heartbeat is watched, until it changes or for
        ``STALE_AFTER_S``.

        Raises:
            UserError: another live process is its writer, or the folder cannot be written.
            StorageOutage: it cannot be written for now.
        """
        lease = cls(folder, secrets.token_hex(8))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replaced = lease._take()
        except OSError as error:
            raise cannot_be_written("run folder", folder, error) from None
        if replaced is not None:
            _log.warning("taking over run folder %s from %s, which is gone", folder, describe(replaced))
        threading.Thread(target=lease._keep_alive, name="lease-heartbeat", daemon=True).start()
        return lease

    @classmethod
    def attach(cls, folder: Path, token: str) -> "Lease":
        """Check against a lease that the launcher holds and keeps alive."""
        return cls(folder, token)

    def check(self) -> None:
        """Assert that the folder is still ours: before each commit, and before anything is removed or moved.

        Raises:
            RunFailure: another process has taken it over, or its lease cannot be read.
        """
        until = time.monotonic() + SETTLE_WITHIN_S
        while True:
            holder, error = None, None
            try:
                holder = _read(self._path)
            except OSError as caught:
                error = caught
            # A file that others replace may be missing for a moment on a network file system, or the system be away.
            if holder is not None or time.monotonic() > until:
                break
            time.sleep(_LOOK_EVERY_S)
        if error is not None:
            raise RunFailure(
                f"whether run folder {self._folder} is still this run's cannot be read ({error.strerror}); nothing "
                "was saved."
            )
        if holder is None or holder["token"] != self._token:
            who = "nobody" if holder is None else describe(holder)
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

    def _take(self) -> dict[str, Any] | None:
        """Write this process into the lease; returns the holder that it replaces.

        Raises:
            UserError: the holder is alive.
        """
        gone: dict[str, Any] | None = None
        while True:
            holder = _read(self._path)
            if holder is not None:
                # Not with the lock in hand: asking takes its time.
                verdict = judge(holder)
                if verdict is Verdict.ALIVE:
                    raise UserError(_refusal(self._folder, holder, "its process is running"))
                if verdict is Verdict.GONE or self._stands_still(holder):
                    gone = holder
            with _exclusive(self._folder):
                now = _read(self._path)
                # What another has taken or renewed meanwhile is judged anew.
                if now is None or now == gone:
                    write_atomically(self._path, json.dumps(new_holder(self._token)))
                    return now

    def _stands_still(self, holder: dict[str, Any]) -> bool:
        """Watch a holder's lease: whether it stays the same for long enough; false where it is there no longer.

        Raises:
            UserError: the holder has renewed it.
        """
        _log.warning(
            "run folder %s is held by %s, whose process cannot be seen from here: watching its heartbeat for up to %g "
            "s",
            self._folder,
            describe(holder),
            STALE_AFTER_S,
        )
        until = time.monotonic() + STALE_AFTER_S
        while time.monotonic() < until:
            time.sleep(_LOOK_EVERY_S)
            now = _read(self._path)
            if now is None or now["token"] != holder["token"]:
                return False
            if now != holder:
                raise UserError(_refusal(self._folder, now, "its heartbeat goes on"))
        return True

    def _keep_alive(self) -> None:
        while not self._released.wait(HEARTBEAT_EVERY_S):
            # A full disk or a file system that is away for a moment must not end the run; the next beat may succeed.
            with contextlib.suppress(OSError), _exclusive(self._folder):
                holder = _read(self._path)
                if self._released.is_set() or (holder is not None and holder["token"] != self._token):
                    return
                # Not made anew where it is missing, since it may have been removed, and a successor may have come and
                # gone.
                if holder is not None:
                    write_atomically(self._path, json.dumps(next_beat(holder)))


def read_holder(folder: Path) -> dict[str, Any] | None:
    """Who holds a run's folder, as ``lease_holder.judge`` takes it; None where nobody does.

    Raises:
        OSError: that cannot be read.
    """
    return _read(folder / "lease.json")


def is_taken_over(folder: Path, token: str | None) -> bool:
    """Whether the folder's writer is now another than the one with this token; never where no token was handed over.

    Nor where that cannot be read: it is asked before a run says how it ended, which must not be lost for that.
    """
    holder = None
    with contextlib.suppress(OSError):
        holder = _read(folder / "lease.json")
    return token is not None and holder is not None and holder["token"] != token


def record_attempt(folder: Path, attempt: int) -> None:
    """Let the folder's lease, if there is one, say which attempt it is held for."""
    path = folder / "lease.json"
    with _exclusive(folder):
        holder = _read(path)
        if holder is not None:
            write_atomically(path, json.dumps(holder | {"attempt": attempt}))


def _refusal(folder: Path, holder: dict[str, Any], why: str) -> str:
    return (
        f"run folder {folder} is in use by {describe(holder)} ({why}); wait for it, stop it with "
        f"`touch {folder}/stop`, or choose another name."
    )


def _exclusive(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the folder's lock; without locks, the token that is checked at each commit is what remains."""
    return exclusive(folder / ".lease.lock", is_required=False)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        holder = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return holder if isinstance(holder, dict) and holder.keys() >= _FIELDS else None
