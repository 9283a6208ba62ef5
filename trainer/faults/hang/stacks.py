"""Python stacks of a rank, ``logs/attempt-N/rank-R.stacks.txt``: on request, and where its main thread stood."""

import faulthandler
import os
import re
import signal
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Nothing else uses it, and Java's users know it for this.
STACKS_SIGNAL = signal.SIGQUIT
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x(?P<id>[0-9a-f]+) .*\(most recent call first\):$")
_FRAME = re.compile(r'^ +File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$')
_FOREIGN = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


@dataclass(frozen=True)
class Frame:
    """One line of a stack."""

    file: str
    line: int
    function: str

    @property
    def is_own(self) -> bool:
        """Whether it is our or the user's code, and not a library's."""
        return not (self.file.startswith((*_FOREIGN, "<")) or "/site-packages/" in self.file)

    def __str__(self) -> str:
        """For people; of the path only the end, which is the same on every machine."""
        return f"{'/'.join(Path(self.file).parts[-2:])}:{self.line} in {self.function}"


class StacksFile:
    """Where this rank's stacks go: by ``dump``, and at SIGQUIT, which needs no Python to run.

    Python's own fault handler writes them from a signal handler in C, also while native code holds the interpreter's
    lock.
    """

    def __init__(self, log_dir: Path, rank: int) -> None:
        """Create the file and take the signal."""
        self._path = stacks_path(log_dir, rank)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        faulthandler.register(STACKS_SIGNAL, file=self._descriptor, all_threads=True)

    def dump(self) -> None:
        """Write the stacks of all threads."""
        faulthandler.dump_traceback(file=self._descriptor, all_threads=True)

    def close(self) -> None:
        """Write nothing any more; an empty file is removed."""
        faulthandler.unregister(STACKS_SIGNAL)
        if os.fstat(self._descriptor).st_size == 0:
            self._path.unlink(missing_ok=True)


def stacks_path(log_dir: Path, rank: int) -> Path:
    """Where a rank's stacks are."""
    return log_dir / f"rank-{rank}.stacks.txt"


def read_stack(log_dir: Path, rank: int, main_thread: int) -> list[Frame]:
    """Where a rank's main thread stood when its stacks were last written, innermost frame first; empty if never."""
    try:
        lines = stacks_path(log_dir, rank).read_text(errors="replace").splitlines()
    except OSError:
        return []
    return last_stack(lines, main_thread)


def last_stack(lines: list[str], main_thread: int | None = None) -> list[Frame]:
    """The last stack of a thread, or of the thread that crashed, that the fault handler has written.

    Args:
        lines: a file's.
        main_thread: the thread's identifier; None for the one that is called current.
    """
    frames: list[Frame] = []
    inside = False
    for line in lines:
        thread = _THREAD.match(line)
        if thread is not None:
            inside = line.startswith("Current") if main_thread is None else int(thread["id"], 16) == main_thread
            frames = [] if inside else frames
            continue
        frame = _FRAME.match(line)
        if inside and frame is not None:
            frames.append(Frame(frame["file"], int(frame["line"]), frame["function"]))
        else:
            inside = False
    return frames


def innermost(frames: list[Frame]) -> Frame | None:
    """The innermost frame of our or the user's code, or just the innermost where there is none; frames inside out."""
    return next((frame for frame in frames if frame.is_own), frames[0] if frames else None)
