"""torch's flight recorder: the latest collectives of each rank, ``logs/attempt-N/rank-R.flight.json``; no pickle."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Each names its group, sizes and state: some 500 bytes.
_NUM_KEPT = 200


@dataclass(frozen=True)
class Collective:
    """One entry of a flight recorder.

    Attributes:
        group: name of the process group, the same on all its ranks.
        number: place among the group's collectives, from 1.
        operation: such as ``all_reduce``.
        sizes: types and shapes of its inputs.
        is_pending: whether this rank had not seen its end.
    """

    group: str
    number: int
    operation: str
    sizes: str
    is_pending: bool

    def __str__(self) -> str:
        """For people."""
        return f"{self.operation} #{self.number} of {self.group} ({self.sizes})"


def dump_flight_recorder(log_dir: Path, rank: int) -> None:
    """Write this rank's latest collectives; to be called from any thread."""
    import torch._C._distributed_c10d as c10d

    found: dict[str, Any] = {}
    # Gloo's and NCCL's are two; a build without NCCL has one.
    for name, function in (("gloo", "_dump_fr_trace_json"), ("nccl", "_dump_nccl_trace_json")):
        dump = getattr(c10d, function, None)
        if dump is not None:
            trace = json.loads(dump())
            trace["entries"] = trace.get("entries", [])[-_NUM_KEPT:]
            found[name] = trace
    flight_path(log_dir, rank).write_text(json.dumps(found))


def flight_path(log_dir: Path, rank: int) -> Path:
    """Where a rank's flight recorder is written."""
    return log_dir / f"rank-{rank}.flight.json"


def read_collectives(log_dir: Path, rank: int) -> list[Collective] | None:
    """A rank's latest collectives, oldest first; None where it has written none."""
    try:
        traces = json.loads(flight_path(log_dir, rank).read_text())
    except (OSError, ValueError):
        return None
    found: dict[tuple[str, int, str], Collective] = {}
    for trace in traces.values():
        for entry in trace["entries"]:
            if not entry.get("is_p2p"):
                collective = _collective(entry)
                # Both recorders may hold the same entry.
                found[collective.group, collective.number, collective.operation] = collective
    return list(found.values())


def _collective(entry: dict[str, Any]) -> Collective:
    group = entry.get("process_group") or ["?", ""]
    shapes = zip(entry.get("input_dtypes", []), entry.get("input_sizes", []), strict=False)
    backend, _, operation = str(entry.get("profiling_name", "?")).rpartition(":")
    # The name is a number; the description tells groups of a mesh apart for people.
    name = f"group {group[0]}" if group[-1] in ("", "undefined") else group[-1]
    return Collective(
        # Gloo and NCCL count for themselves.
        group=f"{backend} {name}".strip(),
        number=int(entry.get("collective_seq_id", 0)),
        operation=operation,
        sizes=", ".join(f"{dtype.lower()} {shape}" for dtype, shape in shapes) or "no tensors",
        is_pending=not entry.get("retired") and entry.get("state") != "completed",
    )
