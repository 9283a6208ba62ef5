"""The file with scores of each class and the confusion matrix of the latest evaluation, beside metrics.jsonl.

Imports no torch.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files.atomic_files import write_atomically

if TYPE_CHECKING:
    from trainer.tasks.task import ClassTable

CLASS_TABLE_NAME = "classes.json"
CONFUSION_NAME = "confusion_matrix"
"""What trackers call the matrix."""


def class_table_values(table: "ClassTable") -> dict[str, Any]:
    """A table as JSON has it: ``classes``, a mapping for each, and ``confusion``; null is what is not finite."""
    rows = [{"name": name, **asdict(scores)} for name, scores in zip(table.classes, table.scores, strict=True)]
    finite = [{key: None if _is_undefined(value) else value for key, value in row.items()} for row in rows]
    return {"classes": finite, "confusion": table.confusion}


def write_class_table(run_dir: Path, step: int, table: "ClassTable") -> None:
    """Write what came of the evaluation after a step, in place of that before it."""
    text = json.dumps({"step": step, **class_table_values(table)}, allow_nan=False)
    write_atomically(run_dir / CLASS_TABLE_NAME, text + "\n")


def read_confusion(run_dir: Path) -> list[list[str | int]] | None:
    """Rows of the confusion matrix of the latest evaluation, each behind its class's name; None where there is none."""
    path = run_dir / CLASS_TABLE_NAME
    if not path.exists():
        return None
    values = json.loads(path.read_text())
    if values["confusion"] is None:
        return None
    return [[row["name"], *counts] for row, counts in zip(values["classes"], values["confusion"], strict=True)]


def _is_undefined(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
