"""What an attempt says of itself once its model stands: ``logs/attempt-N/attempt.json``. Imports no torch."""

from pathlib import Path

from sharding.strict_model import StrictRecord
from trainer.files.atomic_files import write_atomically

_NAME = "attempt.json"


class AttemptRecord(StrictRecord):
    """One start of a run."""

    began_after: int
    """Step of the checkpoint that it continued from; 0 for a fresh start."""

    model: str
    """The model, and how it is divided over which ranks, for people."""


def write_attempt_record(log_dir: Path, record: AttemptRecord) -> None:
    """Write it down for whoever reports on the run."""
    write_atomically(log_dir / _NAME, record.model_dump_json(indent=2) + "\n")


def read_attempt_record(log_dir: Path) -> AttemptRecord | None:
    """What an attempt has said; None where it did not come so far, or is of another release."""
    return AttemptRecord.read(log_dir / _NAME)
