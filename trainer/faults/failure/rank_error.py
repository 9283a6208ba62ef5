"""What a rank itself says of its end: ``logs/attempt-N/rank-R.error.json``, and the file that torch's agent reads."""

import contextlib
import json
import os
import re
import time
import traceback
from pathlib import Path

from pydantic import Field

from sharding.ranks.errors import NonFiniteFailure, UserError
from sharding.strict_model import StrictRecord
from trainer.faults.failure.record import FailureKind
from trainer.faults.hang.stacks import Frame, innermost
from trainer.files.atomic_files import write_atomically
from trainer.runtime.phases import Phase, PhaseState

ELASTIC_ERROR_VARIABLE = "TORCHELASTIC_ERROR_FILE"
# What gloo, NCCL and torch's store say on a rank whose peer is gone or late: never the cause.
_PEER_GONE = re.compile(
    r"Connection closed by peer|ncclRemoteError|ncclSystemError|NCCL communicator was aborted|remote process exited"
    r"|(recv|send)Bytes failed|failed to (recv|send)|Application timeout caused pair closure|Timed out waiting"
    r"|Socket Timeout|wait timeout after"
)
# Anybody at the other end of a line may be meant: a hub, a store, a tracker; unless it is one of these who says so.
_LINE_BROKE = re.compile(r"Connection reset by peer|Broken pipe|Connection refused|Socket closed|Read timeout")
_BETWEEN_RANKS = re.compile(r"gloo|pair\.cc|c10d|NCCL|TCPStore|SocketImpl")


class RankError(StrictRecord):
    """An error that ended a rank."""

    rank: int
    """Its number."""

    time: float
    """When, in seconds since 1970 on its machine's clock."""

    kind: FailureKind = Field(strict=False)
    """What sort of failure it is."""

    type: str
    """Name of the exception's type."""

    message: str
    """What it says."""

    phase: Phase = Field(strict=False)
    """What the rank was doing."""

    step: int
    """Optimizer step that it worked on, from 1; 0 before the first."""

    where: str | None
    """Innermost line of our or the user's code."""

    traceback: str
    """All of it."""

    @property
    def is_consequence(self) -> bool:
        """Whether it says no more than that another rank is gone or late."""
        return is_of_a_peer(self.type, self.message)


def is_of_a_peer(kind: str, message: str) -> bool:
    """Whether an error says no more than that another rank is gone or late.

    Args:
        kind: name of its type.
        message: its text.
    """
    line_broke = _LINE_BROKE.search(message) is not None
    if kind.startswith("Dist"):
        # torch.distributed's own: DistBackendError, DistNetworkError, DistStoreError.
        return line_broke or _PEER_GONE.search(message) is not None
    if kind != "RuntimeError":
        return False
    return _PEER_GONE.search(message) is not None or (line_broke and _BETWEEN_RANKS.search(message) is not None)


def describe_error(error: BaseException, rank: int, state: PhaseState) -> RankError:
    """Take down an error where it was caught.

    Args:
        error: the exception.
        rank: this rank's number.
        state: what the rank was doing.
    """
    steps = traceback.extract_tb(error.__traceback__)
    frame = innermost([Frame(step.filename, step.lineno or 0, step.name) for step in reversed(steps)])
    return RankError(
        rank=rank,
        time=time.time(),
        kind=_kind(error),
        type=type(error).__name__,
        message=str(error),
        phase=state.phase,
        step=state.step,
        where=str(frame) if frame is not None else None,
        traceback="".join(traceback.format_exception(error)),
    )


def write_rank_error(log_dir: Path | None, error: RankError) -> None:
    """Write an error down, as far as that is possible; also for torch's agent, which quotes it.

    Args:
        log_dir: the attempt's logs; None where the rank has not learnt of them.
        error: what happened.
    """
    elastic = os.environ.get(ELASTIC_ERROR_VARIABLE)
    with contextlib.suppress(OSError):
        if log_dir is not None:
            write_atomically(error_path(log_dir, error.rank), error.model_dump_json(indent=2) + "\n")
    with contextlib.suppress(OSError):
        if elastic:
            extra = {"py_callstack": error.traceback, "timestamp": str(int(error.time))}
            message = {"message": f"{error.type}: {error.message}", "extraInfo": extra}
            write_atomically(Path(elastic), json.dumps({"message": message}))


def read_rank_errors(log_dir: Path) -> dict[int, RankError]:
    """Errors that ranks wrote down, by rank."""
    found = [RankError.read(path) for path in log_dir.glob("rank-*.error.json")]
    return {error.rank: error for error in sorted(filter(None, found), key=lambda error: error.rank)}


def error_path(log_dir: Path, rank: int) -> Path:
    """Where a rank's error is."""
    return log_dir / f"rank-{rank}.error.json"


def _kind(error: BaseException) -> FailureKind:
    if isinstance(error, UserError):
        return FailureKind.BAD_INPUT
    if isinstance(error, NonFiniteFailure):
        return FailureKind.NONFINITE
    # By name: this module is read by the launcher, which loads no torch.
    if type(error).__name__ == "OutOfMemoryError":
        return FailureKind.OUT_OF_MEMORY_GPU
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return FailureKind.OUT_OF_MEMORY_HOST
    if isinstance(error, KeyboardInterrupt):
        return FailureKind.KILLED
    return FailureKind.EXCEPTION
