"""Where a rank's output goes: ``logs/attempt-N/rank-R.log``, and for rank 0 the terminal too."""

import logging
import os
import sys
from pathlib import Path


def redirect_output(log_dir: Path, rank: int) -> None:
    """Send this rank's output to its own log file.

    All log records go there. On ranks other than 0 so do standard output and error, at the level of file descriptors,
    so that warnings from C++ and tracebacks are caught too; rank 0 keeps its terminal.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    path = log_dir / f"rank-{rank}.log"
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("shardline")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    if rank == 0:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
