"""Results for programs: one JSON document on standard output, and nothing else there."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def output_aside(enabled: bool) -> Iterator[None]:
    """Within, what anyone prints to standard output goes to standard error: libraries, extensions and children too.

    Args:
        enabled: whether a document is wanted; without one nothing is changed.
    """
    if not enabled:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def print_json(document: Any) -> None:
    """Print a document; what is not finite is null, and a path is text."""
    print(json.dumps(_finite(document), indent=2, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
