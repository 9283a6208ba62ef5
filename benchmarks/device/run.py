"""Running parts: a process and a time-out for each, and the result written again after every one."""

import json
import multiprocessing.connection
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.device.job import (
    DID_NOT_FIT,
    FAILED,
    KILLED,
    MISSING,
    PASSED,
    RIGHT,
    TIMED_OUT,
    Emit,
    Job,
    Missing,
    finite,
    reason_of,
    status_of,
)
from benchmarks.device.plan import FULL_DEADLINE_S, Part, Stage
from sharding.ranks.errors import EXIT_FAILED, EXIT_FINISHED
from sharding.ranks.forked_ranks import rank_context
from sharding.ranks.process_lifetime import die_with_parent
from trainer.files.atomic_files import write_atomically

_LONGEST_LIST = 300
_LONGEST_LOG = 200_000
_POLL_EVERY_S = 1.0


@dataclass
class _Running:
    """A part that is being run."""

    part: Part
    process: BaseProcess
    rows: Path
    begun_at: float
    ends_at: float


class DeviceRun:
    """All parts in turn, and what they found."""

    def __init__(self, output: Path, job: Job, deadline_s: float, started_at: float, header: Mapping[str, Any]) -> None:
        """Plan to run parts.

        Args:
            output: folder of the result, of logs and of what parts need.
            job: what all parts are told; each gets a folder and an end of its own.
            deadline_s: seconds after ``started_at`` by which all is over.
            started_at: on the clock of ``time.monotonic``.
            header: what the result says of machine, versions and code.
        """
        self._output = output
        self._job = job
        self._deadline_s = deadline_s
        self._started_at = started_at
        self._result: dict[str, Any] = {"header": {**header, "deadline_s": deadline_s}, "parts": []}
        (output / "logs").mkdir(parents=True, exist_ok=True)

    @property
    def result(self) -> dict[str, Any]:
        """The header, and of each part its name, end, reason, time in seconds and rows."""
        return self._result

    def run(self, stages: Sequence[Stage], on_end: Callable[[Mapping[str, Any]], None] = lambda _: None) -> None:
        """Run stages, one after the other; ``on_end`` hears of each part when it has ended."""
        self._write()
        for stage in stages:
            self._run_stage(stage, on_end)

    def close(self) -> None:
        """Put what parts said into one file, ``device.log``, and leave nothing else but the result."""
        with (self._output / "device.log").open("w") as target:
            for log in sorted((self._output / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime_ns):
                target.write(f"==== {log.stem}\n{log.read_text(errors='replace')[-_LONGEST_LOG:]}\n")
        for folder in ("logs", "scratch"):
            shutil.rmtree(self._output / folder, ignore_errors=True)

    def _run_stage(self, stage: Stage, on_end: Callable[[Mapping[str, Any]], None]) -> None:
        running: list[_Running] = []
        try:
            for part in stage:
                now = time.monotonic()
                ends_at = self._started_at + min(self._deadline_s, part.ends_by_s * self._deadline_s / FULL_DEADLINE_S)
                if ends_at - now < part.least_s:
                    left_s = max(0.0, ends_at - now)
                    reason = f"{left_s:.0f} s were left and it needs {part.least_s:.0f}"
                    self._record(part, DID_NOT_FIT, reason, now, Path(), on_end)
                    continue
                running.append(self._start(part, now, ends_at))
            while running:
                soonest = min(one.ends_at for one in running) - time.monotonic()
                sentinels = [one.process.sentinel for one in running]
                multiprocessing.connection.wait(sentinels, max(0.0, min(soonest, _POLL_EVERY_S)))
                for one in list(running):
                    status, reason = self._end_of(one)
                    if status:
                        running.remove(one)
                        _kill(one.process)
                        self._record(one.part, status, reason, one.begun_at, one.rows, on_end)
        finally:
            for one in running:
                _kill(one.process)

    def _start(self, part: Part, now: float, ends_at: float) -> _Running:
        scratch = self._output / "scratch" / part.name
        scratch.mkdir(parents=True, exist_ok=True)
        rows = self._output / "logs" / f"{part.name}.jsonl"
        rows.unlink(missing_ok=True)
        job = replace(self._job, scratch=str(scratch), ends_at=ends_at, options=part.options)
        log = self._output / "logs" / f"{part.name}.log"
        process = rank_context().Process(target=_run_part, args=(part.run, job, rows, log))
        process.start()
        return _Running(part, process, rows, now, ends_at)

    def _end_of(self, one: _Running) -> tuple[str, str]:
        """How a part has ended, and why; empty while it runs."""
        status = one.process.exitcode
        if status is None:
            late_by = time.monotonic() - one.ends_at
            return (TIMED_OUT, f"ended after {one.ends_at - one.begun_at:.0f} s") if late_by >= 0 else ("", "")
        if status < 0:
            return KILLED, f"by {signal.Signals(-status).name}"
        ends = [row for row in _read(one.rows) if row.get("kind") == "end"]
        if ends:
            return ends[-1]["status"], ends[-1]["reason"]
        return FAILED, f"ended with status {status} and said nothing"

    def _record(
        self,
        part: Part,
        status: str,
        reason: str,
        begun_at: float,
        rows: Path,
        on_end: Callable[[Mapping[str, Any]], None],
    ) -> None:
        found = [row for row in _read(rows) if row.get("kind") != "end"]
        wrong = [str(row.get("row", "")) for row in found if row.get("passed") is False]
        if status == PASSED and wrong:
            status, reason = FAILED, f"{len(wrong)} of {len(found)} rows: {', '.join(wrong)}"[:_LONGEST_LIST]
        entry = {
            "name": part.name,
            "status": status,
            "reason": reason,
            "begun_s": round(begun_at - self._started_at, 1),
            "elapsed_s": round(time.monotonic() - begun_at, 1),
            "rows": found,
        }
        self._result["parts"].append(entry)
        self._write()
        on_end(entry)

    def _write(self) -> None:
        write_atomically(self._output / "device.json", json.dumps(self._result, indent=1) + "\n")


def _run_part(run: Callable[[Job, Emit], None], job: Job, rows: Path, log: Path) -> None:
    """A part's process from beginning to end."""
    # What it starts ends with it, also where it hangs.
    os.setsid()
    die_with_parent()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)

    if not job.has_gpu:
        torch.set_num_threads(1)

    def emit(row: Mapping[str, Any]) -> None:
        with rows.open("a") as file:
            file.write(json.dumps(finite(row)) + "\n")

    status, reason = PASSED, ""
    try:
        run(job, emit)
    except Missing as error:
        status, reason = MISSING, str(error)
    except BaseException as error:  # noqa: BLE001 - whatever it was is the part's row, and not the command's end
        traceback.print_exc()
        status, reason = status_of(error), reason_of(error)
    emit({"kind": "end", "status": status, "reason": reason})
    # Not by way of the interpreter's shutdown: see trainer.rank.end_process.
    os._exit(EXIT_FINISHED if status in RIGHT else EXIT_FAILED)


def _read(rows: Path) -> list[dict[str, Any]]:
    if not rows.is_file():
        return []
    # A process that was killed may have left half a line.
    lines = rows.read_text(errors="replace").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _kill(process: BaseProcess) -> None:
    """End a part and all that it has started."""
    if process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            # It has ended with all of it, or has not yet made the group.
            process.kill()
    process.join()
