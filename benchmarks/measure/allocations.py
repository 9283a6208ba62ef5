"""Every byte that torch's allocator gives out, over time, and what it is used for.

torch's profiler hears of each allocation and release, on CPU and GPU, in any thread of this process, inside of
operators too, and also where a storage is resized in place, as sharded parameters are. So sums are exact, where
looking at tensors from outside would miss temporaries. What an allocation is used for is told by address; what a
collective allocates for itself is known by where it does so.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

TRANSPORT = "transport"
"""Use of what a collective allocates for itself, as gloo does on its way."""

_MARK = "shardline mark "
_MEMORY = "[memory]"
_COLLECTIVES = ("c10d::", "gloo:", "nccl:")
# As torch's c10::DeviceType numbers them.
_DEVICE_TYPES = {"cpu": 0, "cuda": 1}


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        time: in microseconds, from any origin.
        address: of an allocation; 0 for a mark.
        num_bytes: given out where positive, released where negative.
        mark: number of a mark; None for an allocation.
        is_transport: whether a collective allocates for itself.
    """

    time: float
    address: int
    num_bytes: int
    mark: int | None = None
    is_transport: bool = False


@dataclass
class Allocation:
    """A piece of memory from its allocation to its release.

    Attributes:
        num_bytes: its size.
        begin: index of the event that gave it out.
        end: index of the event that released it, or the number of events.
        use: what it was used for; empty where nobody said.
    """

    num_bytes: int
    begin: int
    end: int
    use: str = ""


class Allocations:
    """Records allocations of one device while it is entered; then tells what was held when."""

    def __init__(self, device: torch.device, uses: Sequence[str]) -> None:
        """Nothing is recorded yet.

        Args:
            device: whose memory.
            uses: what memory can be used for; where two are told of one piece, the earlier in this list counts.
        """
        self._device_type = _DEVICE_TYPES[device.type]
        self._uses = list(uses)
        self._marks: list[tuple[str, str, tuple[int, ...]]] = []
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._events: list[Event] = []
        self._allocations: list[Allocation] = []
        self._largest_transport = 0

    def __enter__(self) -> Self:
        """Begin to record."""
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the recording."""
        self._profile.__exit__(kind, error, trace)
        if error is None:
            self._events = self._read_events()
            told = [(use, addresses) for _, use, addresses in self._marks]
            found = trace_allocations(self._events, told, self._uses)
            self._allocations = [piece for piece in found if piece.use != TRANSPORT]
            self._largest_transport = max((p.num_bytes for p in found if p.use == TRANSPORT), default=0)

    def mark(self, name: str) -> None:
        """Give this moment a name."""
        self._add(name, "", ())

    def tell(self, use: str, tensors: Iterable[torch.Tensor]) -> None:
        """Say what the memory of some tensors is used for."""
        addresses = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._add("", use, tuple(addresses - {0}))

    def held_at(self, name: str) -> dict[str, int]:
        """Bytes by use at the last moment of a name; what nobody said anything of is under the empty name."""
        return held(self._allocations, self._index_of(name), self._uses)

    def peak_between(self, first: str, last: str) -> dict[str, int]:
        """Bytes by use when most was held between the last moments of two names."""
        return held(self._allocations, self._peak_index(first, last), self._uses)

    def largest_transport(self) -> int:
        """Bytes of the largest piece that a collective allocated for itself.

        They are in none of the sums: a collective's own thread releases some, which the profiler does not hear.
        """
        return self._largest_transport

    def _peak_index(self, first: str, last: str) -> int:
        return peak_index(self._allocations, self._index_of(first), self._index_of(last))

    def _add(self, name: str, use: str, addresses: tuple[int, ...]) -> None:
        with record_function(f"{_MARK}{len(self._marks)}"):
            self._marks.append((name, use, addresses))

    def _index_of(self, name: str) -> int:
        number = max(index for index, mark in enumerate(self._marks) if mark[0] == name)
        return next(index for index, event in enumerate(self._events) if event.mark == number)

    def unnamed_at_peak(self, first: str, last: str, num: int = 8) -> list[tuple[int, int]]:
        """Sizes, and how many of each, of what nobody said anything of at the peak between two moments."""
        index = self._peak_index(first, last)
        sizes = Counter(p.num_bytes for p in self._allocations if p.begin <= index < p.end and not p.use)
        return sorted(sizes.items(), key=lambda item: -item[0] * item[1])[:num]

    def _read_events(self) -> list[Event]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            trace: dict[str, Any] = json.loads(path.read_text())
        return read_events(trace["traceEvents"], self._device_type)


def read_events(trace: Iterable[Mapping[str, Any]], device_type: int) -> list[Event]:
    """Allocations and marks of a profiler's trace, in the order of time.

    Args:
        trace: rows in Chrome's format.
        device_type: torch's number of the device whose memory counts.
    """
    rows = sorted((row for row in trace if "ts" in row), key=lambda row: row["ts"])
    # By thread, until when the collective lasts that was called last.
    collective_ends: dict[Any, float] = {}
    events = []
    for row in rows:
        name, time = row.get("name", ""), row["ts"]
        if name.startswith(_COLLECTIVES) and "dur" in row:
            collective_ends[row["tid"]] = max(collective_ends.get(row["tid"], time), time + row["dur"])
        elif name == _MEMORY and row["args"]["Device Type"] == device_type:
            is_transport = time < collective_ends.get(row["tid"], time)
            events.append(Event(time, row["args"]["Addr"], row["args"]["Bytes"], is_transport=is_transport))
        elif name.startswith(_MARK) and row.get("cat") == "user_annotation":
            events.append(Event(time, 0, 0, int(name.removeprefix(_MARK))))
    return events


def trace_allocations(
    events: Sequence[Event], told: Sequence[tuple[str, Iterable[int]]], uses: Sequence[str]
) -> list[Allocation]:
    """Join events to allocations, each with its use.

    Args:
        events: in the order of time; releases of what was given out before are left alone.
        told: by number of a mark, a use and the addresses that are used so at that moment.
        uses: of two that are told of one piece of memory, the earlier counts.
    """
    found: list[Allocation] = []
    live: dict[int, Allocation] = {}
    for index, event in enumerate(events):
        if event.mark is not None:
            use, addresses = told[event.mark]
            for address in addresses:
                piece = live.get(address)
                if (
                    piece is not None
                    and piece.use != TRANSPORT
                    and (not piece.use or uses.index(use) < uses.index(piece.use))
                ):
                    piece.use = use
        elif event.num_bytes > 0:
            if event.address in live:
                # Released in a thread that the profiler does not hear.
                live[event.address].end = index
            use = TRANSPORT if event.is_transport else ""
            live[event.address] = Allocation(event.num_bytes, index, len(events), use)
            found.append(live[event.address])
        elif event.address in live:
            live.pop(event.address).end = index
    return found


def peak_index(allocations: Iterable[Allocation], begin: int, end: int) -> int:
    """Index of the event from ``begin`` to ``end`` after which most is held."""
    changes = [0] * (end + 2)
    for piece in allocations:
        if piece.begin <= end:
            changes[piece.begin] += piece.num_bytes
            changes[min(piece.end, end + 1)] -= piece.num_bytes
    total, best, best_index = 0, -1, begin
    for index in range(end + 1):
        total += changes[index]
        if index >= begin and total > best:
            best, best_index = total, index
    return best_index


def held(allocations: Iterable[Allocation], index: int, uses: Sequence[str]) -> dict[str, int]:
    """Bytes that are held after the index-th event, by use."""
    found = dict.fromkeys([*uses, ""], 0)
    for piece in allocations:
        if piece.begin <= index < piece.end:
            found[piece.use] += piece.num_bytes
    return found
