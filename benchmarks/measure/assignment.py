"""What a rank of ``shardline bench overhead`` is told. Imports no torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Assignment:
    """What a rank is told.

    Attributes:
        size: name of the size.
        config: the run, as plain values.
        num_warmup: rounds that are discarded.
        num_pairs: rounds that count.
        threads: CPU threads of each contestant's operators.
        with_control: whether a second copy of the plain loop takes part.
        start: which start this is, from 0.
        output: JSONL file that rank 0 appends to.
    """

    size: str
    config: dict[str, Any]
    num_warmup: int
    num_pairs: int
    threads: int
    with_control: bool
    start: int
    output: str
