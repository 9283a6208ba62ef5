"""What each contestant of a race holds, one after the other: bytes of tensors between steps, and at most in one."""

import gc
from collections.abc import Mapping
from contextlib import suppress

import torch
import torch.distributed as dist

from benchmarks.contestants.contest import BuildContestant, Contest
from benchmarks.measure.allocations import Allocations
from benchmarks.measure.heard_releases import heard_releases, synchronisation_is_a_collective
from benchmarks.measure.turns import ContestOver
from benchmarks.presentation.result_files import WriteRow

_NUM_WARMUP_STEPS = 3


def measure_memory(contest: Contest, builders: Mapping[str, BuildContestant], *, write: WriteRow) -> None:
    """Build each contestant, let it take some steps, and write what the rank holds that holds most.

    Every allocation counts, activations and what is on its way between ranks too, but for what a collective takes for
    itself.

    Args:
        contest: what all share; its own memory is not counted.
        builders: contestants by name.
        write: takes the rows of the result.
    """
    for name, build in builders.items():
        found = _measure(contest, build)
        if found is not None:
            largest = torch.tensor(found)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            rest_bytes, peak_bytes = largest.tolist()
            write(kind="memory", contestant=name, rest_bytes=rest_bytes, peak_bytes=peak_bytes)
        # Models and optimizers refer to one another.
        gc.collect()


def _measure(contest: Contest, build: BuildContestant) -> list[int] | None:
    """Bytes between steps and at most, of this rank; None for what does not train."""
    device = contest.ranks.device
    with Allocations(device, ()) as allocations, heard_releases(device):
        with synchronisation_is_a_collective():
            contestant = build(contest)
        if not contestant.trains:
            return None

        num_steps = 0

        def edge() -> None:
            nonlocal num_steps
            num_steps += 1
            if num_steps >= _NUM_WARMUP_STEPS:
                contestant.settle()
                allocations.mark("begins" if num_steps == _NUM_WARMUP_STEPS else "ends")
            if num_steps > _NUM_WARMUP_STEPS:
                raise ContestOver

        # Not in a thread of its own: the profiler hears of this one, and of those that autograd has for it.
        with suppress(ContestOver):
            contestant.run(edge)
    return [sum(allocations.held_at("ends").values()), sum(allocations.peak_between("begins", "ends").values())]
