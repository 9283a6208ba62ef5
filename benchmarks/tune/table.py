"""What a search has found: a table on a terminal, Markdown in files and pipes."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

_HEADINGS = ("", "candidate", "tokens/s", "95 % interval", "peak GiB", "formula GiB", "")
_DESCRIBED = (
    "* no other is both faster and smaller. Peaks are of the rank with the most, libraries included on a CPU; the "
    "formula has the state and the least of activations. The interval is of the median over steps that follow one "
    "another: what differs between two starts is not in it."
)

Rows = Sequence[tuple[str, ...]]
"""Cells of each candidate; see ``benchmarks.tune.plan.table_rows``."""


def markdown(rows: Rows, verdict: str) -> str:
    """The result for a file.

    Args:
        rows: of the table.
        verdict: what to take, in sentences.
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (_HEADINGS, ["---"] * len(_HEADINGS), *rows)]
    return "\n".join([*lines, "", f"\\{_DESCRIBED}", "", verdict])


def show(rows: Rows, verdict: str, console: Console) -> None:
    """Print the result.

    Args:
        rows: of the table.
        verdict: what to take, in sentences.
        console: where to.
    """
    if not console.is_terminal:
        console.file.write(f"\n{markdown(rows, verdict)}\n")
        return
    table = Table(*_HEADINGS)
    for cells in rows:
        # A reason may have brackets, which are no styles.
        table.add_row(*map(Text, cells), style="bold" if cells[0] else "")
    console.print(table)
    console.print(_DESCRIBED, markup=False, style="dim")
    console.print(verdict, soft_wrap=True, markup=False)
