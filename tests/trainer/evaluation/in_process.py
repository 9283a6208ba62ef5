"""``shardline evaluate`` without a process for it."""

import os
import tempfile
from pathlib import Path
from typing import Any

from trainer.evaluation.on_ranks import evaluate_subject
from trainer.evaluation.subject import Asked, find_subject


def found(run: object, num_ranks: int = 1, **asked: Any) -> dict[str, Any]:
    """What the command finds, on one rank unless told otherwise."""
    before = dict(os.environ)
    try:
        with tempfile.TemporaryDirectory() as work:
            subject = find_subject(Asked(str(run), **asked), num_ranks, Path(work))
            return evaluate_subject(subject, num_ranks, Path(work)) | {"step": subject.step}
    finally:
        os.environ.clear()
        os.environ.update(before)
