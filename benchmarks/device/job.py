"""What a part of ``python -m benchmarks.device`` is told, and how it says what it found."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PASSED, FAILED, OUT_OF_MEMORY, TIMED_OUT, KILLED = "passed", "failed", "out of memory", "timed out", "killed"
DID_NOT_FIT, MISSING = "did not fit", "missing"
RIGHT = (PASSED, DID_NOT_FIT, MISSING)
"""Ends of a part that are no failure; what did not fit and what is missing is named."""

_LONGEST_REASON = 300

ROOT = Path(__file__).resolve().parent.parent.parent
"""The checkout or installation whose packages run."""

Emit = Callable[[Mapping[str, Any]], None]
"""Takes a row. ``passed`` false in one fails its part; rows are kept also where the part is ended later."""


@dataclass(frozen=True)
class Job:
    """One part's work.

    Attributes:
        scratch: folder of the part alone.
        cache: folder of prepared text, for all parts.
        results: what the parts before this one have found, as JSON.
        corpus: a text file to train on; empty for the embedded corpus.
        has_gpu: whether the full form is asked for, on a GPU; else the small one.
        ends_at: when the part is ended, on the clock of ``time.monotonic``.
        options: what the plan adds.
    """

    scratch: str
    cache: str
    results: str
    corpus: str
    has_gpu: bool
    ends_at: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> list[str]:
        """Settings of the text that all parts train on, so that it is prepared once."""
        source = [f"data.paths=[{self.corpus}]"] if self.corpus else []
        return [
            f"data.source={'text' if self.corpus else 'python-stdlib'}",
            *source,
            "data.hub_name=null",
            "data.hub_config=null",
            "data.tokenizer=train-bpe",
            f"data.vocab_size={2048 if self.has_gpu else 512}",
            f"data.max_documents={1000 if self.has_gpu else 40}",
            "data.validation_fraction=0",
            f"data.cache_dir={self.cache}",
        ]

    @property
    def quiet(self) -> list[str]:
        """Settings without which a short run would evaluate, save or track."""
        return [
            "tokens=null",
            "epochs=null",
            "evaluation.every_steps=0",
            "checkpoint.every_steps=0",
            "checkpoint.keep_every=0",
            "tracking.wandb.mode=disabled",
        ]


class Missing(Exception):
    """What a part needs is not there; the sentence says what."""


def status_of(error: BaseException) -> str:
    """What a row says of an exception in a word or three."""
    is_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    return OUT_OF_MEMORY if is_memory else FAILED


def reason_of(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST_REASON]


def finite(value: Any) -> Any:
    """A value of JSON with null in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, list | tuple) else value
