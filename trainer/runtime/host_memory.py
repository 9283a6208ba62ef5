"""The heap of a rank whose tensors lie in the host's memory. Imports no torch."""

import ctypes
from collections.abc import Mapping

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
MMAP_THRESHOLD_BYTES = 32 * 2**20
"""Smaller blocks are kept; it is the most that glibc takes."""

_VARIABLES = (
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
)


def keep_freed_memory(environment: Mapping[str, str]) -> bool:
    """Let the heap keep what a step frees, for the next step; returns whether it will.

    glibc's malloc gives large blocks back to the kernel when they are freed, and the kernel clears their pages when
    they are asked for again: at the quickstart's size up to 9,000 page faults in each step, 4 % of its processor time
    (docs/benchmarks.md). Blocks above 32 MiB go back all the same. See mallopt(3).

    Args:
        environment: a user's own settings of malloc, such as MALLOC_TRIM_THRESHOLD_, are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in environment for name in _VARIABLES):
        return False
    # -1 keeps the top of the heap whatever its size, and either call ends glibc's own adjustment of both.
    return bool(mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES) and mallopt(_M_TRIM_THRESHOLD, -1))
