"""One rank of ``shardline tune``: the throughput benchmark's, within a limit of memory."""

import os
import resource
import sys
from pathlib import Path

import torch

from benchmarks.throughput.rank import main

LIMIT_VARIABLE = "SHARDLINE_TUNE_BYTES"
"""Bytes that a rank may use of its device from here on; on a CPU what is loaded by now does not count."""


def limit_memory(num_bytes: int) -> None:
    """Let allocations beyond so many bytes fail."""
    if torch.cuda.is_available():
        device = int(os.environ["LOCAL_RANK"])
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total), device)
        return
    lines = Path("/proc/self/status").read_text().splitlines()
    held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + num_bytes, held + num_bytes))


if __name__ == "__main__":
    if LIMIT_VARIABLE in os.environ:
        limit_memory(int(os.environ[LIMIT_VARIABLE]))
    main(sys.argv[1:])
