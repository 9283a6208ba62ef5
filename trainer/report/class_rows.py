"""Scores of each class and the confusion matrix of a run's latest evaluation, as rows of text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.metrics.class_table import CLASS_TABLE_NAME
from trainer.report.attempts import read_json

MAX_SHOWN_CLASSES = 30
"""Classes of a confusion matrix that a page has room for."""


@dataclass(frozen=True)
class ConfusionCell:
    """One cell of a confusion matrix: a count, and its share of the row, which shades it, from 0 to 1."""

    count: str
    share: float
    is_right: bool


@dataclass(frozen=True)
class ClassRows:
    """What a report shows of classes.

    Attributes:
        step: of the evaluation.
        scores: of each class its name, precision, recall, F1 and number of samples.
        names: of the confusion matrix's classes.
        confusion: its rows, by true class; empty where there are too many.
    """

    step: int
    scores: list[tuple[str, ...]]
    names: list[str]
    confusion: list[list[ConfusionCell]]


def read_class_rows(run_dir: Path) -> ClassRows | None:
    """Read what a run's latest evaluation has left; None where there are no classes, or the file is damaged."""
    values = read_json(run_dir / CLASS_TABLE_NAME)
    try:
        scores = [
            (str(row["name"]), *(f"{float(row[key]):.4f}" for key in ("precision", "recall", "f1")), _count(row))
            for row in values["classes"]
        ]
        matrix = values["confusion"] or []
        confusion = [_cells(place, row) for place, row in enumerate(matrix) if len(matrix) <= MAX_SHOWN_CLASSES]
        return ClassRows(int(values["step"]), scores, [row[0] for row in scores], confusion)
    except (KeyError, TypeError, ValueError):
        return None


def _count(row: dict[str, Any]) -> str:
    return f"{int(row['num_samples']):,}"


def _cells(place: int, row: list[int]) -> list[ConfusionCell]:
    total = max(sum(row), 1)
    return [
        ConfusionCell(f"{count:,}", round(count / total, 3), is_right=place == column)
        for column, count in enumerate(row)
    ]
