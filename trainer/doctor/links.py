"""All-reduce and pairwise bandwidth."""

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from sharding.ranks.object_exchange import gather_objects
from sharding.ranks.process_group import Ranks
from trainer.doctor.facts import Link, Links

_NUM_REPEATS = 3


def measure_links(ranks: Ranks, ends: Sequence[int], all_reduce_bytes: int, pair_bytes: int) -> Links:
    """Measure bandwidths; a collective over all ranks, who all get the same answer.

    Args:
        ranks: this rank's place.
        ends: ranks between which links are measured, such as the first of each machine.
        all_reduce_bytes: size of the all-reduce.
        pair_bytes: size of a message between two ranks.
    """
    if ranks.world_size == 1:
        return Links()
    tensor = torch.ones(all_reduce_bytes // 4, device=ranks.device)
    seconds = _median_s(lambda: dist.all_reduce(tensor), ranks.device)
    pairs = _measure_pairs(ranks, ends, pair_bytes)
    gathered = gather_objects(pairs, ranks)
    slowest = torch.tensor(seconds, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return Links(
        all_reduce_bytes_per_s=bus_bandwidth(all_reduce_bytes, float(slowest), ranks.world_size),
        all_reduce_bytes=all_reduce_bytes,
        pairs=[link for links in gathered for link in links],
    )


def bus_bandwidth(num_bytes: int, seconds: float, num_ranks: int) -> float:
    """Bytes per second that each link carries in a ring all-reduce: 2 (n - 1) / n x size / time.

    Source: NVIDIA nccl-tests, doc/PERFORMANCE.md.
    """
    return 2 * (num_ranks - 1) / num_ranks * num_bytes / seconds


def rounds_of_pairs(ends: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Every pair once, in rounds in which nobody is in two pairs (the circle method of round-robin tournaments)."""
    places: list[int | None] = [*ends]
    if len(places) % 2:
        places.append(None)
    rounds = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        matches = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in matches if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def _measure_pairs(ranks: Ranks, ends: Sequence[int], num_bytes: int) -> list[Link]:
    """Links whose lower rank this is."""
    out = torch.ones(num_bytes // 4, device=ranks.device)
    received = torch.empty_like(out)
    found = []
    for pairs in rounds_of_pairs(ends):
        # One round after the other, or pairs would share links that are measured.
        dist.barrier()
        mine = next((pair for pair in pairs if ranks.rank in pair), None)
        if mine is None:
            continue
        peer = mine[1] if ranks.rank == mine[0] else mine[0]

        def swap(peer: int = peer) -> None:
            operations = [dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, received, peer)]
            for work in dist.batch_isend_irecv(operations):
                work.wait()

        seconds = _median_s(swap, ranks.device)
        if ranks.rank == mine[0]:
            found.append(Link(first=mine[0], second=mine[1], bytes_per_s=num_bytes / seconds))
    return found


def _median_s(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of an action, which is done once more at first: connections are made by the first."""
    times = []
    for _ in range(_NUM_REPEATS + 1):
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[_NUM_REPEATS // 2]
