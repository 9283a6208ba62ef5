"""``events.jsonl`` in the run folder: one line for everything out of the ordinary, over all attempts of a run."""

import json
import os
import time
from pathlib import Path
from typing import Any

EVENTS_NAME = "events.jsonl"


def record_event(run_dir: Path, kind: str, *, attempt: int, step: int, **details: Any) -> None:
    """Append one line; call it where the run's folder may be written: on rank 0, or in the launcher.

    One write call of an O_APPEND file: a line is complete, also where rank 0 and the launcher write at the same moment.

    Args:
        run_dir: the run's folder.
        kind: what happened, such as ``spike`` or ``restart``.
        attempt: number of the attempt.
        step: the optimizer step at which it happened; 0 before the first.
        details: further plain values.
    """
    line = {"time": time.time(), "attempt": attempt, "step": step, "kind": kind, **details}
    descriptor = os.open(run_dir / EVENTS_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first; a line that a crash cut short is left out."""
    try:
        lines = (run_dir / EVENTS_NAME).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
