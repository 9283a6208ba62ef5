"""Tables for people: columns side by side, of which nothing is cut, whatever shows them."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows as lines, each column as wide as what is in it.

    Args:
        rows: the header first.
        right: columns of numbers, which end in line.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
