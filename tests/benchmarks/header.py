"""The first row of a benchmark's result, for tests."""

from typing import Any


def result_header(benchmark: str, **values: Any) -> dict[str, Any]:
    """What every benchmark says of itself, and what this one says beside it."""
    return {
        "kind": "header",
        "time": "2026-01-05T12:00:00+0000",
        "code": {"git_revision": "abc"},
        "hardware": {"cpu": "A", "usable_cores": 2, "memory_gib": 8, "gpus": []},
        "load_average": [0.0, 0.0, 0.0],
        "python": "3.11.7",
        "packages": {"torch": "2.13"},
        "command": ["shardline", "bench", benchmark],
    } | values
