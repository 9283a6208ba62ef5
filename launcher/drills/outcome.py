"""What a drill found, for a person and for programs."""

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Check:
    """One claim.

    Attributes:
        claim: what should be so.
        holds: whether it is.
        detail: what was found.
        is_timed: whether a busy machine alone may make it fail.
    """

    claim: str
    holds: bool
    detail: str = ""
    is_timed: bool = False


@dataclass
class Outcome:
    """A drill's result.

    Attributes:
        name: the drill.
        checks: its claims.
        detect_s: seconds from the fault to its being known; None where there is nothing to detect.
        recover_s: seconds from the fault to the first step after it.
    """

    name: str
    checks: list[Check] = field(default_factory=list)
    detect_s: float | None = None
    recover_s: float | None = None

    @property
    def passed(self) -> bool:
        """Whether every claim holds."""
        return all(check.holds for check in self.checks)

    def expect(self, claim: str, holds: bool, detail: object = "", *, is_timed: bool = False) -> None:
        """Add a claim."""
        self.checks.append(Check(claim, bool(holds), str(detail), is_timed))

    def show(self, console: Console) -> None:
        """Print the claims and times."""
        table = Table(title=f"drill {self.name}: {'pass' if self.passed else 'FAIL'}", title_justify="left")
        table.add_column("")
        table.add_column("claim")
        table.add_column("found")
        for check in self.checks:
            table.add_row("ok" if check.holds else "FAIL", check.claim, check.detail)
        console.print(table)
        console.print(f"detected after {_seconds(self.detect_s)}, training again after {_seconds(self.recover_s)}")

    def values(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "passed": self.passed,
            "detect_s": self.detect_s,
            "recover_s": self.recover_s,
            "checks": [vars(check) for check in self.checks],
        }


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"
