"""Silent corruption: whether ranks that should hold the same parameters do."""

import hashlib
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sharding.engine import Engine
from sharding.ranks.errors import RunFailure
from sharding.ranks.object_exchange import gather_objects
from sharding.ranks.process_group import Ranks
from sharding.replicas import content_hashes, layout_hash

_NUM_NAMED = 3


@dataclass(frozen=True)
class _Copy:
    """What one rank holds, and where it runs; ranks with one layout should hold the same."""

    rank: int
    place: str
    layout: int
    hashes: tuple[int, ...]

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.place})"


class ReplicaCheck:
    """Compares the copies of parameters on all ranks by their hashes."""

    def __init__(self, engine: Engine, ranks: Ranks, record: Callable[[int, dict[str, Any]], None]) -> None:
        """Bind to an engine.

        Args:
            engine: an engine that has replicas.
            ranks: this rank's place.
            record: called on rank 0 with the step and what was found, before the run fails.
        """
        self._engine = engine
        self._ranks = ranks
        self._record = record

    def run(self, step: int) -> None:
        """Compare; every rank must call it after the same step.

        Raises:
            RunFailure: they differ; on all ranks alike.
        """
        replicas = self._engine.replicas()
        if not replicas or self._ranks.world_size == 1:
            return
        # Waits for the device.
        hashes = content_hashes([part.tensor for part in replicas]).tolist()
        digest = hashlib.sha256(repr(hashes).encode()).digest()
        layout = layout_hash(replicas)
        own = torch.tensor([layout, int.from_bytes(digest[:8], "little", signed=True)])
        gathered = [torch.empty_like(own) for _ in range(self._ranks.world_size)]
        dist.all_gather(gathered, own)
        found = {tuple(pair.tolist()) for pair in gathered}
        if len(found) == len({held for held, _ in found}):
            return
        # All ranks have seen that they differ, so all of them come here.
        own_copy = _Copy(self._ranks.rank, self._place(), layout, tuple(hashes))
        copies = gather_objects(own_copy, self._ranks)
        details = _describe(copies, [part.name for part in replicas], step)
        if self._ranks.rank == 0:
            self._record(step, details)
        raise RunFailure(details["reason"])

    def _place(self) -> str:
        device = self._ranks.device
        name = f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "CPU"
        return f"{socket.gethostname()}, {name}"


def _describe(copies: list[_Copy], names: list[str], step: int) -> dict[str, Any]:
    """Whose copies differ from those of most: as values for an event, with a sentence."""
    layout = next(c.layout for c in copies if len({other.hashes for other in copies if other.layout == c.layout}) > 1)
    members = [copy for copy in copies if copy.layout == layout]
    (most, count), *_ = Counter(copy.hashes for copy in members).most_common()
    has_majority = count > len(members) / 2
    odd = [copy for copy in members if not has_majority or copy.hashes != most]
    differing = [name for index, name in enumerate(names) if len({copy.hashes[index] for copy in members}) > 1]
    if has_majority:
        verdict = f"{_listed(odd)} {'differs' if len(odd) == 1 else 'differ'} from the other {count}"
    else:
        verdict = f"{_listed(odd)} differ, and there is no majority that would tell which is right"
    more = f" and {len(differing) - _NUM_NAMED} more" if len(differing) > _NUM_NAMED else ""
    reason = (
        f"ranks that should hold the same parameters did not after step {step}: {verdict}, in "
        f"{', '.join(differing[:_NUM_NAMED])}{more}; memory or a processor there may be faulty: test that machine or "
        "leave it out, and run again to continue from the last checkpoint."
    )
    return {"ranks": [copy.rank for copy in odd], "places": [copy.place for copy in odd]} | {
        "parameters": differing[:_NUM_NAMED],
        "num_parameters": len(differing),
        "reason": reason,
    }


def _listed(copies: list[_Copy]) -> str:
    *others, last = map(str, copies)
    return f"{', '.join(others)} and {last}" if others else last
