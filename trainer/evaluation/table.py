"""What came of an evaluation, for a person."""

from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.evaluation.on_ranks import Result

_MAX_COLUMNS = 20


def print_result(result: Result, title: str, console: Console) -> None:
    """Show metrics, and of a classification scores of each class and the confusion matrix.

    Args:
        result: of the evaluation.
        title: what was evaluated, and on what.
        console: where to.
    """
    console.print(title, markup=False)
    metrics = Table()
    metrics.add_column("metric")
    metrics.add_column("value", justify="right")
    for name, value in result["metrics"].items():
        if not name.startswith("f1/"):
            metrics.add_row(name, _shown(value))
    console.print(metrics)
    if "classes" not in result:
        return
    classes = Table(title="classes")
    classes.add_column("class")
    for header in ("precision", "recall", "f1", "samples", "taken for it"):
        classes.add_column(header, justify="right")
    for row in result["classes"]:
        scores = [_shown(row[name]) for name in ("precision", "recall", "f1")]
        classes.add_row(row["name"], *scores, f"{row['num_samples']:,}", f"{row['num_predicted']:,}")
    console.print(classes)
    if result["confusion"] is not None and len(result["confusion"]) <= _MAX_COLUMNS:
        # A title of the table's would be folded to its width, which is that of a few numbers.
        console.print("samples by their class, a row, and the class that they were taken for, a column")
        console.print(_confusion_table(result["classes"], result["confusion"]))


def _confusion_table(classes: list[dict[str, Any]], confusion: list[list[int]]) -> Table:
    table = Table()
    table.add_column("")
    for row in classes:
        table.add_column(row["name"], justify="right")
    for row, counts in zip(classes, confusion, strict=True):
        table.add_row(row["name"], *(f"{count:,}" for count in counts))
    return table


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"
