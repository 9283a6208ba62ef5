"""One rank of ``shardline bench collectives``."""

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.presentation.result_files import append_row
from sharding.flat_collectives import all_gather, reduce_scatter
from sharding.ranks.errors import EXIT_FAILED, EXIT_FINISHED
from sharding.ranks.process_group import Ranks, process_group
from sharding.ranks.process_lifetime import die_with_parent
from trainer.doctor.links import rounds_of_pairs
from trainer.runtime.processes import end_process

COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather")

_JOIN_TIMEOUT_S = 300.0
# One clock reading covers as many repeats as move about this many bytes, so that short messages are timed too.
_BYTES_PER_READING = 4 << 20
_MAX_REPEATS = 50
# From this number of ranks on, a rank's links to those at distances of 1, 2, 4, ... stand for all of its links.
_MAX_RANKS_ALL_LINKS = 16


@dataclass(frozen=True)
class CollectivesAssignment:
    """What a rank is told.

    Attributes:
        sizes: of messages, in bytes.
        num_warmup: rounds that are discarded.
        num_rounds: rounds that count.
        threads: CPU threads of its operators.
        output: JSONL file that rank 0 appends to.
    """

    sizes: list[int]
    num_warmup: int
    num_rounds: int
    threads: int
    output: str


def main(arguments: Sequence[str]) -> None:
    """Measure; the only argument is a JSON file with a CollectivesAssignment."""
    die_with_parent()
    end_process(measure_here(CollectivesAssignment(**json.loads(Path(arguments[0]).read_text()))))


def measure_here(assignment: CollectivesAssignment) -> int:
    """Measure as the rank that a launcher has made of this process; returns the exit status."""
    torch.set_num_threads(assignment.threads)
    try:
        with process_group(_JOIN_TIMEOUT_S) as ranks:
            _Measurement(assignment, ranks).run()
    except BaseException:  # noqa: BLE001 - whatever it was, the other ranks must not wait for this one
        traceback.print_exc()
        end_process(EXIT_FAILED)
    return EXIT_FINISHED


def num_repeats(num_bytes: int) -> int:
    """How often a message of a size is sent between two readings of the clock."""
    return max(1, min(_MAX_REPEATS, _BYTES_PER_READING // num_bytes))


def links_of(num_ranks: int) -> list[tuple[int, int]]:
    """Pairs of ranks whose links are measured: all, or of many ranks those at distances that are powers of two."""
    pairs = [pair for pairs in rounds_of_pairs(range(num_ranks)) for pair in pairs]
    if num_ranks <= _MAX_RANKS_ALL_LINKS:
        return sorted(pairs)
    return sorted(pair for pair in pairs if (pair[1] - pair[0]).bit_count() == 1)


class _Measurement:
    """Rounds over all collectives and sizes in turn, so that what slows a machine for a while falls on all alike."""

    def __init__(self, assignment: CollectivesAssignment, ranks: Ranks) -> None:
        self._assignment = assignment
        self._ranks = ranks
        num_elements = max(assignment.sizes) // 4 + ranks.world_size
        self._whole = torch.ones(num_elements, device=ranks.device)
        self._part = torch.ones(num_elements // ranks.world_size + 1, device=ranks.device)

    def run(self) -> None:
        """All of it."""
        assignment, size = self._assignment, self._ranks.world_size
        self._check_sums()
        for index in range(assignment.num_warmup + assignment.num_rounds):
            kind = "warmup" if index < assignment.num_warmup else "round"
            for name in COLLECTIVES:
                for num_bytes in assignment.sizes:
                    moved = self._moved_bytes(name, num_bytes)
                    repeats = num_repeats(num_bytes)
                    seconds = self._time(partial(self._call, name, num_bytes), repeats)
                    self._write(kind=kind, collective=name, num_bytes=moved, seconds=self._gather(seconds))
            if self._ranks.rank == 0 and index + 1 == assignment.num_warmup:
                print(f"{size} ranks: warmed up", flush=True)
        for pair in links_of(size):
            for num_bytes in (min(assignment.sizes), max(assignment.sizes)):
                self._measure_link(pair, num_bytes)

    def _call(self, name: str, num_bytes: int) -> None:
        """One collective over ``num_bytes`` of the whole message."""
        part = self._part[: self._part_elements(num_bytes)]
        if name == "all-reduce":
            dist.all_reduce(self._whole[: num_bytes // 4])
            return
        whole = self._whole[: len(part) * self._ranks.world_size]
        if name == "reduce-scatter":
            reduce_scatter(part, whole)
        else:
            all_gather(whole, part)

    def _part_elements(self, num_bytes: int) -> int:
        return max(1, num_bytes // 4 // self._ranks.world_size)

    def _moved_bytes(self, name: str, num_bytes: int) -> int:
        """The size of a message as it is: one that is divided over ranks has equal parts."""
        if name == "all-reduce":
            return num_bytes // 4 * 4
        return self._part_elements(num_bytes) * self._ranks.world_size * 4

    def _check_sums(self) -> None:
        """Assert that collectives do their work, before they are timed.

        Raises:
            RuntimeError: one does not.
        """
        for name in COLLECTIVES:
            self._whole.fill_(1.0)
            self._part.fill_(float(self._ranks.rank))
            num_bytes = min(self._assignment.sizes)
            self._call(name, num_bytes)
            size, part = self._ranks.world_size, self._part_elements(num_bytes)
            if name == "all-gather":
                expected = torch.arange(size).repeat_interleave(part).float()
                found = self._whole[: size * part]
            else:
                found = self._whole[: num_bytes // 4] if name == "all-reduce" else self._part[:part]
                expected = torch.full_like(found, float(size))
            if not torch.equal(found, expected.to(found.device)):
                raise RuntimeError(f"{name} over {size} ranks gave a wrong result")
        # Sums of zeros stay what they are, however often they are added up.
        self._whole.zero_()
        self._part.zero_()

    def _time(self, action: Callable[[], None], repeats: int) -> float:
        """Seconds of one call on this rank, from the moment at which all ranks are there."""
        self._wait_for_all_ranks()
        began = time.perf_counter()
        for _ in range(repeats):
            action()
        self._synchronize()
        return (time.perf_counter() - began) / repeats

    def _measure_link(self, pair: tuple[int, int], num_bytes: int) -> None:
        """A message to and fro between two ranks while the others wait: half of its time is one way."""
        message = self._whole[: num_bytes // 4]
        rank, repeats = self._ranks.rank, num_repeats(num_bytes)

        def ping_pong() -> None:
            if rank == pair[0]:
                dist.send(message, pair[1])
                dist.recv(message, pair[1])
            elif rank == pair[1]:
                dist.recv(message, pair[0])
                dist.send(message, pair[0])

        one_way_s = []
        for index in range(self._assignment.num_warmup + self._assignment.num_rounds):
            seconds = self._gather(self._time(ping_pong, repeats) / 2)[pair[0]]
            if index >= self._assignment.num_warmup:
                one_way_s.append(seconds)
        self._write(kind="link", first=pair[0], second=pair[1], num_bytes=num_bytes // 4 * 4, seconds=one_way_s)

    def _gather(self, value: float) -> list[float]:
        local = torch.tensor([value], dtype=torch.float64)
        rows = [torch.empty_like(local) for _ in range(self._ranks.world_size)]
        dist.all_gather(rows, local)
        return [float(row) for row in rows]

    def _wait_for_all_ranks(self) -> None:
        self._synchronize()
        # On the host, over gloo.
        dist.all_reduce(torch.zeros(1))

    def _synchronize(self) -> None:
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)

    def _write(self, **row: Any) -> None:
        if self._ranks.rank == 0:
            append_row(Path(self._assignment.output), row)


if __name__ == "__main__":
    main(sys.argv[1:])
