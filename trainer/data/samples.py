"""What training and evaluation ask of whatever is learnt from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from sharding.engine import Batch
from trainer.data.facts import SampleFacts

FILLER = -1
"""Position of a sample that only fills up a batch of an evaluation, and is evaluated elsewhere."""


class Samples(Protocol):
    """Samples of one or several splits, each found by its index in its split."""

    @property
    def fingerprint(self) -> str:
        """Identity of the contents: equal for equal samples, wherever they lie."""

    @property
    def facts(self) -> SampleFacts:
        """What is known of all samples."""

    def num_samples(self, split: str) -> int:
        """Samples of a split, ``train``, ``validation`` or ``test``; 0 where there is no such split."""

    def read(self, split: str, indices: Sequence[int]) -> Batch:
        """Samples by index, in this order, on the host; dim 0 of each tensor is the sample.

        Raises:
            UserError: they cannot be read, or are not what was prepared.
        """


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Samples of a micro-batch as they were read, before a task makes its batch of them.

    Attributes:
        samples: what ``Samples.read`` gave.
        positions: global position of each in training, counted over all epochs, or in the split that is evaluated;
            int64 [micro], ``FILLER`` where a sample only fills up.
        beside: what a run keeps of each sample elsewhere, and adds to the batch that a task makes; mostly nothing.
    """

    samples: Batch
    positions: torch.Tensor
    beside: Batch = field(default_factory=dict)
