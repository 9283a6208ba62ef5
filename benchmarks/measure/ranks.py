"""Starting the ranks of a benchmark on this machine, and seeing them end."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from sharding.ranks.errors import EXIT_BAD_INPUT, EXIT_FAILED
from sharding.ranks.local_group import free_port, rank_variables
from trainer.runtime.host_memory import MMAP_THRESHOLD_BYTES

INTERRUPTED = 130
"""Exit status of what was interrupted."""

HEAP_VARIABLES = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
"""One heap for all contestants of a race, which keeps what is freed, as Shardline's ranks do: see
trainer.runtime.host_memory.

Contestants are threads. glibc gives threads heaps of their own, and these back to the kernel in pieces of 64 MiB; which
contestant had to ask for them again, with thousands of page faults a step, was a matter of luck.
"""

_NUM_LOG_LINES = 40
_POLL_EVERY_S = 0.5


class RankAssignment(Protocol):
    """What ranks are told: a dataclass that knows how many threads each of them has."""

    @property
    def threads(self) -> int:
        """CPU threads of a rank's operators."""
        ...


def run_ranks(
    module: str,
    assignment: RankAssignment,
    num_ranks: int,
    log: Path,
    *,
    variables: Mapping[str, str] = HEAP_VARIABLES,
    shows_log: bool = True,
) -> int:
    """Start the ranks and see them end; returns their exit status, or 130 if interrupted.

    What libraries warn of goes to the log; the end of it is shown where a rank failed.

    Args:
        module: what each rank runs, with the name of a JSON file of the assignment as its argument.
        assignment: a dataclass.
        num_ranks: how many.
        log: text file that is appended to.
        variables: what to add to the environment.
        shows_log: show its end where a rank failed.
    """
    with tempfile.TemporaryDirectory(prefix="shardline-bench-") as folder, log.open("a") as stderr:
        path = Path(folder) / "assignment.json"
        path.write_text(json.dumps(asdict(assignment)))  # type: ignore[call-overload] # a Protocol is no dataclass
        command = [sys.executable, "-m", module, str(path)]
        shared = {"OMP_NUM_THREADS": str(assignment.threads), "TOKENIZERS_PARALLELISM": "false", **variables}
        port = free_port()
        ranks = [
            subprocess.Popen(command, env=os.environ | shared | rank_variables(rank, num_ranks, port), stderr=stderr)
            for rank in range(num_ranks)
        ]
        try:
            status = _wait(ranks)
        except KeyboardInterrupt:
            # What was measured so far stands in the file.
            return INTERRUPTED
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if status < 0:
            stderr.write(f"error: a rank was killed by {signal.Signals(-status).name}\n")
            status = EXIT_FAILED
    if status and shows_log:
        lines = log.read_text().splitlines()
        # Of bad input a sentence says all, which each rank has written, perhaps before another's warnings.
        sentences = [line for line in lines if line.startswith("error: ")][-1:] if status == EXIT_BAD_INPUT else []
        print("\n".join(sentences or lines[-_NUM_LOG_LINES:]), file=sys.stderr)
    return status


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all have ended well, or one has not; returns its exit status."""
    while True:
        statuses = [process.poll() for process in ranks]
        failed = [status for status in statuses if status]
        if failed or None not in statuses:
            return failed[0] if failed else 0
        time.sleep(_POLL_EVERY_S)
