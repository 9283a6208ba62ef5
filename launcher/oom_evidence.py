"""Whether the kernel ended a process for want of memory: its own counts and messages, before and after."""

import contextlib
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.faults.failure.record import Evidence

_CGROUPS = Path("/sys/fs/cgroup")
_KERNEL_LOG = Path("/dev/kmsg")
# "Out of memory: Killed process 4711 (python)", "Memory cgroup out of memory: Killed process 4711 (python)".
_KILLED = re.compile(r"[Oo]ut of memory: Killed process (?P<pid>\d+) ")
_RECORD_BYTES = 8192
# Longer than it takes to see that a rank has ended.
_FORGOTTEN_AFTER_S = 10.0


@dataclass(frozen=True)
class _Count:
    path: Path
    num_kills: int


class OomWatch:
    """Looks now and then, and once more when a rank has ended.

    Counts name no process, so one that rose long before the rank's end must not be taken for its cause.
    """

    def __init__(self) -> None:
        """Note the present counts."""
        self._before = self._latest = _read_counts()
        self._looked_at = time.monotonic()
        self._started_us = _uptime_us()

    def look(self) -> None:
        """Forget what rose a while ago; call it as long as no rank has failed."""
        now = time.monotonic()
        if now >= self._looked_at + _FORGOTTEN_AFTER_S:
            self._before, self._latest, self._looked_at = self._latest, _read_counts(), now

    def find(self, pids: Iterable[int]) -> Evidence | None:
        """What tells that the OOM killer ended one of these processes, or lately one of their control group.

        The kernel's own message goes first, since it names the process; it is not readable everywhere.
        """
        wanted = set(pids)
        for at_us, text in _kernel_messages():
            killed = _KILLED.search(text)
            if killed is not None and at_us >= self._started_us and int(killed["pid"]) in wanted:
                return Evidence(source=str(_KERNEL_LOG), text=text)
        after = {count.path: count.num_kills for count in _read_counts()}
        for count in self._before:
            now = after.get(count.path, count.num_kills)
            if now > count.num_kills:
                text = f"the count of OOM kills rose from {count.num_kills} to {now}"
                return Evidence(source=str(count.path), text=text)
        return None

    def describe(self) -> str:
        """Where was looked."""
        places = [str(count.path) for count in self._before]
        if os.access(_KERNEL_LOG, os.R_OK):
            places.append(str(_KERNEL_LOG))
        return ", ".join(places) or "nowhere: neither control groups nor the kernel's log can be read here"


def _read_counts() -> list[_Count]:
    """Counts of this process's control groups, which its children share: version 2, or 1."""
    counts = []
    for path in _count_files():
        with contextlib.suppress(OSError, ValueError):
            fields = dict(line.split(maxsplit=1) for line in path.read_text().splitlines() if " " in line)
            if "oom_kill" in fields:
                counts.append(_Count(path, int(fields["oom_kill"])))
    return counts


def _count_files() -> list[Path]:
    found: list[Path] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            place = path.lstrip("/")
            if controllers == "":
                found += [_CGROUPS / place / "memory.events", _CGROUPS / "memory.events"]
            elif "memory" in controllers.split(","):
                # In a container the path is the host's, and the group is mounted at the root.
                found += [_CGROUPS / "memory" / place / "memory.oom_control", _CGROUPS / "memory/memory.oom_control"]
    return [path for path in dict.fromkeys(found) if path.exists()]


def _kernel_messages() -> list[tuple[int, str]]:
    """Times in microseconds since boot, and texts; empty where they may not be read."""
    messages: list[tuple[int, str]] = []
    try:
        descriptor = os.open(_KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return messages
    try:
        while True:
            try:
                record = os.read(descriptor, _RECORD_BYTES).decode(errors="replace")
            except BrokenPipeError:
                # Overwritten while we read: the next one is the oldest there is.
                continue
            except OSError:
                return messages
            head, _, text = record.partition(";")
            fields = head.split(",")
            if len(fields) >= 3 and fields[2].isdigit():
                messages.append((int(fields[2]), text.splitlines()[0] if text else ""))
    finally:
        os.close(descriptor)


def _uptime_us() -> int:
    try:
        return int(float(Path("/proc/uptime").read_text().split()[0]) * 1e6)
    except (OSError, ValueError):
        return 0
