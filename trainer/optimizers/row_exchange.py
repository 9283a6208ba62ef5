"""Divided matrices put together on their owners, and back."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from sharding.part import Part


class RowExchange:
    """Moves matrices whose rows are divided over a group: each to the one rank that owns it, and the rows back.

    Every rank of the group must make the same exchanges in the same order. Each is one all-to-all.
    """

    def __init__(self, matrices: Sequence[Part], group: dist.ProcessGroup) -> None:
        """Choose owners so that the cost of matrix products is even over ranks, the same way on every rank."""
        self._group = group
        self._rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self._num_columns = [matrix.global_shape[1] for matrix in matrices]
        self._num_rows = [_rows_of_ranks(matrix.global_shape[0], num_ranks) for matrix in matrices]
        for matrix, counts in zip(matrices, self._num_rows, strict=True):
            if matrix.rows is None or counts[self._rank] != len(matrix.rows):
                raise RuntimeError(f"{matrix.name} is not divided into rows as torch.chunk does")
        self._owned: list[list[int]] = [[] for _ in range(num_ranks)]
        costs = [min(m.global_shape) * m.global_shape[0] * m.global_shape[1] for m in matrices]
        loads = [0] * num_ranks
        for index in sorted(range(len(matrices)), key=lambda index: (-costs[index], index)):
            owner = loads.index(min(loads))
            self._owned[owner].append(index)
            loads[owner] += costs[index]

    def to_owners(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Send this rank's rows of every matrix; returns the whole matrices that this rank owns."""
        outgoing = [[rows[index] for index in indices] for indices in self._owned]
        mine = self._owned[self._rank]
        shapes = [
            [(self._num_rows[index][source], self._num_columns[index]) for index in mine]
            for source in range(len(self._owned))
        ]
        incoming = self._exchange(outgoing, shapes, rows[0])
        return [torch.cat(parts) for parts in zip(*incoming, strict=True)]

    def to_rows(self, owned: Sequence[torch.Tensor], like: torch.Tensor) -> list[torch.Tensor]:
        """Send the matrices that this rank owns; returns this rank's rows of every matrix."""
        mine = self._owned[self._rank]
        divided = [matrix.split(self._num_rows[index]) for index, matrix in zip(mine, owned, strict=True)]
        outgoing = [[parts[target] for parts in divided] for target in range(len(self._owned))]
        shapes = [
            [(self._num_rows[index][self._rank], self._num_columns[index]) for index in indices]
            for indices in self._owned
        ]
        incoming = self._exchange(outgoing, shapes, like)
        rows = {
            index: part
            for indices, parts in zip(self._owned, incoming, strict=True)
            for index, part in zip(indices, parts, strict=True)
        }
        return [rows[index] for index in range(len(self._num_rows))]

    def _exchange(
        self, outgoing: list[list[torch.Tensor]], shapes: list[list[tuple[int, int]]], like: torch.Tensor
    ) -> list[list[torch.Tensor]]:
        """One all-to-all: per rank what it is sent, and the shapes of what it sends back."""
        sizes = [[rows * columns for rows, columns in of_rank] for of_rank in shapes]
        sent = [tensor.reshape(-1) for of_rank in outgoing for tensor in of_rank]
        buffer = torch.cat(sent) if sent else like.new_empty(0)
        received = like.new_empty(sum(map(sum, sizes)))
        dist.all_to_all_single(
            received,
            buffer,
            output_split_sizes=[sum(of_rank) for of_rank in sizes],
            input_split_sizes=[sum(tensor.numel() for tensor in of_rank) for of_rank in outgoing],
            group=self._group,
        )
        parts = iter(received.split([size for of_rank in sizes for size in of_rank]))
        return [[next(parts).view(shape) for shape in of_rank] for of_rank in shapes]


def _rows_of_ranks(num_rows: int, num_ranks: int) -> list[int]:
    """How many rows each rank has: equal chunks from the front, so that the last ranks may have fewer or none."""
    chunk = -(-num_rows // num_ranks)
    return [max(0, min(chunk, num_rows - rank * chunk)) for rank in range(num_ranks)]
