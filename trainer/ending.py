"""What is known of a rank while it runs, and what it says when something goes wrong."""

import contextlib
import logging
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import torch

from sharding.ranks.errors import EXIT_BAD_INPUT, EXIT_FAILED, RunFailure, UserError
from trainer.faults.failure.rank_error import describe_error, write_rank_error
from trainer.faults.failure.report import Sources, write_failure
from trainer.faults.hang.flight_recorder import dump_flight_recorder
from trainer.faults.hang.heartbeat import read_heartbeats
from trainer.faults.hang.rank_process import kill
from trainer.faults.hang.verdict import Hang
from trainer.faults.hang.watchdog import Watchdog
from trainer.loop import Trainer
from trainer.metrics.file import Metrics
from trainer.metrics.goodput_ledger import GoodputLedger
from trainer.run_folder.events import record_event
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.lease import Lease
from trainer.runtime.drain import Drain
from trainer.runtime.phases import Phases
from trainer.runtime.processes import end_process
from trainer.trackers.observer import Observer
from trainer.trackers.observers import Observers

_log = logging.getLogger("shardline")


@dataclass(frozen=True)
class TrainingResult:
    """How a call of ``train`` ended, the same on all ranks.

    Attributes:
        status: whether the run has finished, or was asked to stop, saved, and continues when it is called again.
        exit_code: what a script that does nothing else should end with.
        step: finished steps.
        metrics: the newest line of metrics.jsonl, ``step`` included; empty where there is none.
        run_folder: where the run lives.
    """

    status: Literal["finished", "stopped"]
    exit_code: int
    step: int
    metrics: Metrics
    run_folder: Path


@dataclass
class Progress:
    """What is known when something goes wrong.

    Attributes:
        rank: this rank's number.
        own_observers: the user's own.
        is_guest: whether the process is not the run's own: then who called the run hears of an error, and says it.
        last_metrics: the newest line of metrics.jsonl at the end, the same on all ranks.
        has_finished: whether nothing is left to train.
        error: what has ended the run.
    """

    rank: int = 0
    own_observers: Sequence[Observer] = ()
    is_guest: bool = False
    last_metrics: Metrics = field(default_factory=dict)
    has_finished: bool = False
    error: BaseException | None = None
    run_folder: RunFolder | None = None
    trainer: Trainer | None = None
    observers: Observers | None = None
    lease: Lease | None = field(default=None)
    phases: Phases = field(default_factory=Phases)
    attempt: int = 0
    watchdog: Watchdog | None = None
    ledger: GoodputLedger | None = None
    drain: Drain | None = None

    @property
    def step(self) -> int:
        """Finished steps, as far as they are known."""
        return self.trainer.step if self.trainer is not None else 0

    def warn(self, sentence: str) -> None:
        """Tell a person, on the console where there is one."""
        console = self.observers.console if self.observers is not None else None
        (console.warning if console is not None else _log.warning)(sentence)


def report_error(progress: Progress, error: BaseException) -> int:
    """Say what has ended a rank, in its run folder and to a person; returns the exit status."""
    progress.error = error
    if isinstance(error, UserError):
        return _report(progress, error, "bad_input", EXIT_BAD_INPUT, str(error))
    if isinstance(error, RunFailure | torch.OutOfMemoryError):
        return _report(progress, error, "failed", EXIT_FAILED, _one_sentence(error))
    if not progress.is_guest:
        traceback.print_exception(error)
    if _log.handlers:
        _log.error("%s", "".join(traceback.format_exception(error)))
    return _report(progress, error, "failed", EXIT_FAILED, f"{type(error).__name__}: {error}")


def _one_sentence(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        peak_gib = torch.cuda.max_memory_allocated() / 2**30
        total_gib = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
        return (
            f"out of GPU memory: the peak was {peak_gib:.1f} of {total_gib:.1f} GiB; lower batch.micro_size "
            "(accumulation makes up for it), set activation_checkpointing.mode=full, or parallel.strategy=zero3."
        )
    return str(error)


def end_hanging(progress: Progress, hang: Hang) -> NoReturn:
    """End this rank, whose main thread may be stuck; called in the watchdog's thread."""
    run_folder = progress.run_folder
    assert run_folder is not None
    if progress.ledger is not None:
        progress.ledger.write()
    with contextlib.suppress(OSError):
        late = hang.late[0] if hang.late else None
        if run_folder.write_outcome("failed", EXIT_FAILED, progress.step, hang.reason, late):
            attempt, step = progress.attempt, progress.phases.now.step
            record_event(run_folder.path, "hang", attempt=attempt, step=step, rank=late, reason=hang.reason)
            _write_failure(progress)
    _log.error("hang: %s", hang.reason)
    print(f"error: {hang.reason}", file=sys.stderr)
    for heartbeat in read_heartbeats(run_folder.log_dir(progress.attempt)).values():
        # It would not answer an agent's SIGTERM either, and the agent would wait for half a minute.
        if heartbeat.state == "running":
            kill(heartbeat)
    end_process(EXIT_FAILED)


def stop_watchdog(progress: Progress) -> None:
    """From here on, nobody needs to watch this rank or wait for it."""
    if progress.watchdog is not None:
        progress.watchdog.stop()


def _write_failure(progress: Progress) -> None:
    """Say what this rank can see; under our launcher, which sees more, the launcher will do it again."""
    run_folder = progress.run_folder
    outcome = run_folder.read_outcome() if run_folder is not None else None
    if run_folder is not None and outcome is not None and progress.attempt:
        with contextlib.suppress(OSError):
            write_failure(Sources(run_folder.path, progress.attempt, outcome))


def _report(progress: Progress, error: BaseException, status: str, exit_code: int, reason: str) -> int:
    run_folder = progress.run_folder
    log_dir = run_folder.log_dir(progress.attempt) if run_folder is not None and progress.attempt else None
    write_rank_error(log_dir, describe_error(error, progress.rank, progress.phases.now))
    if log_dir is not None and progress.watchdog is not None:
        # What this rank waited in, if it was another that failed.
        with contextlib.suppress(Exception):
            dump_flight_recorder(log_dir, progress.rank)
    is_first = (
        run_folder is not None
        and run_folder.path.exists()
        and run_folder.write_outcome(status, exit_code, progress.step, reason, rank=progress.rank)
    )
    if is_first:
        _write_failure(progress)
    stop_watchdog(progress)
    # Every rank finds the same mistake in a configuration; one of them saying so is enough.
    is_said = status != "bad_input" or progress.rank == 0 or progress.trainer is not None
    if is_said and not progress.is_guest:
        print(f"error: rank {progress.rank}: {reason}" if progress.rank else f"error: {reason}", file=sys.stderr)
    if _log.handlers:
        # Without the rank's log file, logging would print the sentence a second time.
        _log.error("%s", reason)
    return exit_code
