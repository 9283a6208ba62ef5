"""The sums of a task's metrics over the held-out split, whose draws belong to samples and not to layouts."""

from collections.abc import Iterable

import torch

from sharding.engine import Batch, Engine
from sharding.ranks.object_exchange import sum_integers_over_ranks
from sharding.ranks.process_group import Ranks
from trainer.runtime.randomness import generator_states, seed_sample
from trainer.tasks.task import Task


class Evaluation:
    """Evaluates weights, such that two evaluations of the same weights are equal.

    A task may draw when it makes batches or computes metrics, and a model in its pass. All draws for a sample come from
    a seed of the run's seed and the sample's position, whatever rank and micro-batch it is in. Where anything is drawn,
    samples are therefore taken one by one; where nothing is, which the generators tell, as they come.
    """

    def __init__(self, engine: Engine, task: Task, ranks: Ranks, *, dp_rank: int, seed: int) -> None:
        """Bind to what is evaluated.

        Args:
            engine: holds the weights.
            task: makes batches and says what is summed.
            ranks: this rank's place.
            dp_rank: place among the ranks that read different data, which are all of them.
            seed: the run's seed.
        """
        self._engine = engine
        self._task = task
        self._ranks = ranks
        self._dp_rank = dp_rank
        self._seed = seed
        self._draws_in_pass: bool | None = None

    def sums(self, micro_batches: Iterable[Batch]) -> torch.Tensor | None:
        """This rank's sums over its share of a split; None where there is none.

        Every rank must call it, with equally many micro-batches, each of as many rows.

        Args:
            micro_batches: packed sequences, as ``evaluation_batches`` divides them over ranks.
        """
        total: torch.Tensor | None = None
        for index, sequences in enumerate(micro_batches):
            num_rows = len(sequences["input_ids"])
            first = (index * self._ranks.world_size + self._dp_rank) * num_rows
            sums = self._sums_of(self._make_batch(sequences, first), first, num_rows)
            total = sums if total is None else total + sums
        return total

    def _make_batch(self, sequences: Batch, first: int) -> Batch:
        seed_sample(self._seed, first)
        before = generator_states()
        # It may change what it is given, which is read once more where it draws.
        batch = self._task.make_batch({name: tensor.clone() for name, tensor in sequences.items()})
        if generator_states() == before:
            return batch
        rows = []
        for row, single in enumerate(_rows(sequences, len(sequences["input_ids"])) or []):
            seed_sample(self._seed, first + row)
            rows.append(self._task.make_batch(single))
        shapes = [{name: tensor.shape[1:] for name, tensor in row.items()} for row in rows]
        # Rows of several lengths are put together by the task alone: then the seed is that of the first.
        is_even = all(shape == shapes[0] for shape in shapes) and all(t.ndim for row in rows for t in row.values())
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]} if is_even else batch

    def _sums_of(self, batch: Batch, first: int, num_rows: int) -> torch.Tensor:
        singles = _rows(batch, num_rows)
        if self._draws_in_pass and singles is not None:
            sums = []
            for row, single in enumerate(singles):
                seed_sample(self._seed, first + row)
                sums.append(self._engine.evaluate_batch(single))
            return torch.stack(sums).sum(dim=0)
        seed_sample(self._seed, first)
        before = generator_states()
        sums_of_all = self._engine.evaluate_batch(batch)
        if self._draws_in_pass is None:
            # Once, and alike on all ranks, which must make equally many passes.
            num_drawing = sum_integers_over_ranks(int(generator_states() != before), self._ranks)
            self._draws_in_pass = num_drawing > 0
            if self._draws_in_pass:
                return self._sums_of(batch, first, num_rows)
        return sums_of_all


def _rows(batch: Batch, num_rows: int) -> list[Batch] | None:
    """A batch's rows as batches of one; None where it has another number of them."""
    if any(tensor.ndim == 0 or len(tensor) != num_rows for tensor in batch.values()):
        return None
    return [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(num_rows)]
