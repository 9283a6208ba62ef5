"""What was out of the ordinary in a run, as rows of text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.run_folder.events import read_events

MAX_EVENTS = 200
_NUM_NAMED = 3
_COLUMNS = ("time", "attempt", "step", "kind")


@dataclass(frozen=True)
class EventRow:
    """One event.

    Attributes:
        attempt: number of the attempt.
        step: step at which it happened.
        kind: what happened.
        details: everything else that it says, shortened.
    """

    attempt: str
    step: str
    kind: str
    details: str


def event_rows(run_dir: Path) -> list[EventRow]:
    """The latest events of a run, oldest first."""
    events = [event for event in read_events(run_dir) if isinstance(event, dict)]
    return [_row(event) for event in events[-MAX_EVENTS:]]


def _row(event: dict[str, Any]) -> EventRow:
    details = [f"{name}: {_short(value)}" for name, value in event.items() if name not in _COLUMNS]
    attempt, step, kind = (str(event.get(name, "-")) for name in _COLUMNS[1:])
    return EventRow(attempt, step, kind, "; ".join(details))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        # Documents, by what their source calls them.
        named = ", ".join(str(item.get("id", item)) for item in value[:_NUM_NAMED])
        return named + (f" and {len(value) - _NUM_NAMED} more" if len(value) > _NUM_NAMED else "")
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]} [...]"
