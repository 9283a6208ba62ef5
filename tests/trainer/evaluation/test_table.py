"""The tables of an evaluation, on a terminal of 80 columns."""

import io

from rich.console import Console

from trainer.evaluation.table import print_result


def test_what_the_confusion_matrix_is_stands_above_it_in_one_line() -> None:
    scores = {"precision": 0.96875, "recall": None, "f1": 1.0, "num_samples": 31, "num_predicted": 1032}
    shown = io.StringIO()
    print_result(
        {
            "metrics": {"accuracy": 0.9, "f1/good": 1.0},
            "classes": [{"name": name, **scores} for name in ("good", "bad")],
            "confusion": [[1, 30], [0, 1002]],
        },
        "step 45 of runs/reviews on the split test: 60 samples",
        Console(file=shown, width=80, highlight=False),
    )
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    heading = lines.index("samples by their class, a row, and the class that they were taken for, a column")
    matrix = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines[heading + 1 :] if "│" in line]
    assert matrix == [["good", "1", "30"], ["bad", "0", "1,002"]]
