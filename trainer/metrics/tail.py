"""The end of metrics.jsonl, which may be growing. Imports no torch."""

import json
from pathlib import Path
from typing import Any

_TAIL_BYTES = 64 * 2**10


def last_metrics(path: Path) -> dict[str, Any]:
    """The newest complete line of metrics; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return {}
    for line in reversed(lines):
        if line.endswith(b"\n"):
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if isinstance(values, dict):
                return values
    return {}
