"""What the doctor found, as a table or as lines."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from sharding.ranks.sentences import print_error
from trainer.doctor.verdicts import Check, Verdict

_COLOURS = {Verdict.PASS: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}


def print_checks(checks: Sequence[Check]) -> None:
    """Show what was found, and on standard error once more what fails."""
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if console.is_terminal:
        table = Table("check", "", "found")
        for check in checks:
            found = check.value + (f"\n{check.remedy}" if check.remedy else "")
            table.add_row(check.name, f"[{_COLOURS[check.verdict]}]{check.verdict}", found)
        console.print(table)
    else:
        for check in checks:
            remedy = f"; {check.remedy}" if check.remedy else ""
            console.print(f"{check.verdict:<4}  {check.name}: {check.value}{remedy}", markup=False)
    for check in checks:
        if check.verdict is Verdict.FAIL:
            print_error(f"{check.name}: {check.value}; {check.remedy}")
