"""A task's metrics over the held-out split, whose draws belong to samples and not to layouts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Protocol

import torch

from sharding.engine import Batch
from sharding.parallel_dims import Role
from sharding.ranks.errors import UserError
from sharding.ranks.object_exchange import gather_rows, sum_integers_over_ranks
from sharding.ranks.process_group import Ranks
from trainer.data.batch import pinned
from trainer.data.samples import FILLER, MicroBatch
from trainer.runtime.randomness import generator_states, seed_sample
from trainer.tasks.named_sums import NamedSums
from trainer.tasks.task import ClassTable, Metric, Task

_BATCHES_AT_ONCE = 64
"""Batches whose sums exist at once, for a confusion matrix of many classes is large."""


@dataclass(frozen=True)
class Evaluated:
    """What came of an evaluation.

    Attributes:
        metrics: by name.
        class_table: scores of each class, of a classification.
    """

    metrics: dict[str, Metric]
    class_table: ClassTable | None


class Evaluates(Protocol):
    """What an evaluation asks of an engine."""

    def evaluate(self, batches: Iterable[Batch]) -> list[torch.Tensor]:
        """See Engine."""


class Evaluation:
    """Evaluates weights, such that two evaluations of the same weights are equal.

    A task may draw when it makes batches or computes metrics, and a model in its pass. All draws for a sample come from
    a seed of the run's seed and the sample's position, whatever rank and micro-batch it is in. Where anything is drawn,
    samples are therefore taken one by one; where nothing is, which the generators tell, as they come.
    """

    def __init__(
        self, engine: Evaluates, task: Task, named_sums: NamedSums, ranks: Ranks, data: Role, seed: int
    ) -> None:
        """Bind to what is evaluated.

        Args:
            engine: holds the weights.
            task: makes batches and says what is summed.
            named_sums: what the engine evaluates by.
            ranks: this rank's place.
            data: place among the ranks that read different data.
            seed: the run's seed.
        """
        self._engine = engine
        self._task = task
        self._named_sums = named_sums
        self._ranks = ranks
        self._data = data
        self._seed = seed
        self._draws_in_pass: bool | None = None

    def metrics(self, micro_batches: Iterable[MicroBatch]) -> dict[str, Metric]:
        """The task's metrics over a whole split; none where nothing is held out. See ``sums``."""
        evaluated = self.evaluate(micro_batches)
        return {} if evaluated is None else evaluated.metrics

    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> "Evaluated | None":
        """What the task makes of a whole split; None where nothing is held out. See ``sums``."""
        sums = self.sums(micro_batches)
        if sums is None:
            return None
        by_name = self._named_sums.by_name(gather_rows(sums.double().cpu(), self._ranks))
        return Evaluated(self._task.metrics(by_name), self._task.class_table(by_name))

    def sums(self, micro_batches: Iterable[MicroBatch]) -> torch.Tensor | None:
        """This rank's sums over its share of a split, as ``NamedSums.total`` has them; None where there is none.

        Every rank must call it, with equally many micro-batches, each of as many rows.

        Args:
            micro_batches: samples, as ``evaluation_batches`` divides them over ranks.

        Raises:
            UserError: the task counts targets in samples that only fill up a batch.
        """
        made = self._made(micro_batches)
        head = next(made, None)
        if head is None:
            return None
        tried = self._try(head) if self._draws_in_pass is None else []
        if self._draws_in_pass:
            return self._named_sums.total(self._sums_by_sample(one) for one in chain([head], made))
        left = self._seeded((one.batch, one.first) for one in (made if tried else chain([head], made)))
        total = self._named_sums.total(tried) if tried else None
        while of_batches := self._engine.evaluate(islice(left, _BATCHES_AT_ONCE)):
            total = self._named_sums.total(of_batches if total is None else [total, *of_batches])
        return total

    def _made(self, micro_batches: Iterable[MicroBatch]) -> Iterator["_Made"]:
        for index, micro in enumerate(micro_batches):
            num_rows = len(micro.positions)
            first = (index * self._data.degree + self._data.rank) * num_rows
            batch = self._make_batch(micro, first)
            self._refuse_targets_of_fillers(batch, micro.positions)
            yield _Made(pinned(batch), first, num_rows)

    def _make_batch(self, micro: MicroBatch, first: int) -> Batch:
        seed_sample(self._seed, first)
        before = generator_states()
        # It may change what it is given, which is read once more where it draws.
        samples = {name: tensor.clone() for name, tensor in micro.samples.items()}
        batch = self._task.make_batch(samples, micro.positions, training=False)
        if generator_states() == before:
            return batch
        rows = []
        for row, single in enumerate(_rows(micro.samples, len(micro.positions)) or []):
            seed_sample(self._seed, first + row)
            rows.append(self._task.make_batch(single, micro.positions[row : row + 1], training=False))
        shapes = [{name: tensor.shape[1:] for name, tensor in row.items()} for row in rows]
        # Rows of several lengths are put together by the task alone: then the seed is that of the first.
        is_even = all(shape == shapes[0] for shape in shapes) and all(t.ndim for row in rows for t in row.values())
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]} if is_even else batch

    def _refuse_targets_of_fillers(self, batch: Batch, positions: torch.Tensor) -> None:
        """Assert that samples that only fill up are not counted, for they are evaluated elsewhere."""
        fillers = (positions == FILLER).tolist()
        singles = _rows(batch, len(fillers)) if any(fillers) else None
        counted = [single for single, is_filler in zip(singles or [], fillers, strict=False) if is_filler]
        if num_targets := sum(map(self._task.num_targets, counted)):
            raise UserError(
                f"the task counts {num_targets} targets in {len(counted)} samples at position {FILLER}, which only "
                "fill up the last batch of an evaluation; let its make_batch give them no target."
            )

    def _try(self, made: "_Made") -> list[torch.Tensor]:
        """Evaluate a batch as it is, and find out whether anything is drawn in its pass, on any rank.

        Once, and alike on all ranks, which must make equally many passes.
        """
        seed_sample(self._seed, made.first)
        before = generator_states()
        sums = self._engine.evaluate([made.batch])
        self._draws_in_pass = sum_integers_over_ranks(int(generator_states() != before), self._ranks) > 0
        return sums

    def _sums_by_sample(self, made: "_Made") -> torch.Tensor:
        singles = _rows(made.batch, made.num_rows)
        seeded = [(made.batch, made.first)] if singles is None else zip(singles, count(made.first), strict=False)
        of_samples = torch.stack(self._engine.evaluate(self._seeded(seeded)))
        num_added = self._named_sums.num_added
        return torch.cat([of_samples[:, :num_added].sum(dim=0), of_samples[:, num_added:].flatten()])

    def _seeded(self, batches: Iterable[tuple[Batch, int]]) -> Iterator[Batch]:
        """Batches, each with the generators seeded for the sample at its position, when its pass begins."""
        for batch, position in batches:
            seed_sample(self._seed, position)
            yield batch


@dataclass(frozen=True)
class _Made:
    """A batch as the task has made it, the position of its first sample, and their number."""

    batch: Batch
    first: int
    num_rows: int


def _rows(batch: Batch, num_rows: int) -> list[Batch] | None:
    """A batch's rows as batches of one; None where it has another number of them."""
    if any(tensor.ndim == 0 or len(tensor) != num_rows for tensor in batch.values()):
        return None
    return [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(num_rows)]
