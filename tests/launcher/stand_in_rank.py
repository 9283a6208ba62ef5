"""Stands in for a rank under a real agent; without torch it starts in a moment.

``python -m tests.launcher.stand_in_rank BEHAVIOUR RUN_FOLDER``; writes its process id to ``RUN_FOLDER/pid-RANK``.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from sharding.ranks.process_lifetime import LAUNCHER_PID_VARIABLE, die_with_parent, stop_with_deepspeed
from trainer.run_folder.folder import RunFolder
from trainer.runtime.foreign_settings import refuse_foreign_settings
from trainer.runtime.stopping import StopRequest

# DeepSpeed's launcher puts --local_rank=N first.
BEHAVIOUR, FOLDER, RANK = sys.argv[-2], RunFolder(Path(sys.argv[-1])), int(os.environ["RANK"])


def main() -> int:
    die_with_parent()
    stop_with_deepspeed()
    stop = StopRequest()
    stop.install_handlers()
    (FOLDER.path / f"pid-{RANK}.tmp").write_text(str(os.getpid()))
    (FOLDER.path / f"pid-{RANK}.tmp").rename(FOLDER.path / f"pid-{RANK}")
    if BEHAVIOUR == "finish":
        refuse_foreign_settings(os.environ)
        if RANK == 0:
            FOLDER.write_outcome("finished", 0, 6, "all steps done")
        return 0
    if BEHAVIOUR == "import-error" and RANK == 1:
        import a_module_that_nobody_has  # noqa: F401
    if BEHAVIOUR == "raise" and RANK == 1:
        FOLDER.write_outcome("failed", 1, 3, "ValueError: a wrong number", 1)
        return 1
    if BEHAVIOUR == "bad-input":
        FOLDER.write_outcome("bad_input", 2, 0, "data.paths names no file; check the path.", RANK)
        return 2
    if BEHAVIOUR == "killed":
        _end_by_a_signal()
    stop_file = None if BEHAVIOUR == "stoppable-by-signal" else FOLDER.stop_file
    while not (BEHAVIOUR.startswith("stoppable") and stop.poll(stop_file)):
        time.sleep(0.05)
    if RANK == 0:
        FOLDER.write_outcome("stopped", 75, 4, "stopped on request")
    while FOLDER.read_outcome() is None:
        time.sleep(0.01)
    return 75


def _end_by_a_signal() -> None:
    """Rank 1 is killed; the other loses its connection and says so."""
    if RANK == 1:
        # A real rank is there for seconds before it can be killed, and watched.
        while not ((FOLDER.path / "pid-0").exists() and _is_watched()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    other = FOLDER.path / "pid-1"
    while not other.exists() or _is_running(int(other.read_text())):
        time.sleep(0.01)
    FOLDER.write_outcome("failed", 1, 5, "RuntimeError: Connection closed by peer", 0)
    sys.exit(1)


def _is_watched() -> bool:
    """Whether the launcher has a descriptor of this process, which tells it of its end."""
    for file in Path(f"/proc/{os.environ[LAUNCHER_PID_VARIABLE]}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            if f"Pid:\t{os.getpid()}\n" in file.read_text():
                return True
    return False


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


sys.exit(main())
