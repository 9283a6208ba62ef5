"""``shardline slurm status|logs|cancel``: what runs and jobs are doing, from run folders and squeue alone."""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.slurm.queue import QueuedJob, call, queued_jobs
from launcher.slurm.reasons import meaning_of
from launcher.slurm.submit import jobs_of
from sharding.ranks.errors import UserError
from trainer.config.stages import num_positions_after
from trainer.metrics.file import last_metrics
from trainer.run_folder.folder import RunFolder
from trainer.runtime.durations import duration_text
from trainer.runtime.json_output import print_json
from trainer.runtime.text_table import text_table

_HEADER = ("RUN", "JOB", "STATE", "NODES", "STEP", "LOSS", "TOKENS/S", "TIME LEFT", "LIMIT IN", "STARTS")
_LOOK_EVERY_S = 0.5


def show_status(folders: Sequence[Path], watch_s: float, as_json: bool) -> None:
    """Print a table of runs: those given, or all that were submitted to the folders' runs; again and again if asked.

    Raises:
        UserError: one document is asked for, and many.
    """
    if as_json:
        if watch_s:
            raise UserError("--json is one document, which --watch would show again and again; leave one of them out.")
        known = queued_jobs()
        print_json({"runs": [_facts(run_dir, job, known) for run_dir, job in _submitted(folders, known)]})
        return
    while True:
        table = _table(folders)
        if not watch_s:
            print(table)
            return
        print(f"\x1b[2J\x1b[H{time.strftime('%H:%M:%S')}  every {watch_s:g} s, Ctrl-C to end\n\n{table}", flush=True)
        try:
            time.sleep(watch_s)
        except KeyboardInterrupt:
            return


def show_logs(run_dir: Path, rank: int | None, follow: bool) -> None:
    """Print the output of a run's newest job, or the log of a rank in its newest attempt; go on as it grows if asked.

    Raises:
        UserError: there is none yet.
    """
    shown: Path | None = None
    position = 0
    while True:
        path = _log(run_dir, rank)
        if path is None and not follow:
            what = "job output" if rank is None else f"log of rank {rank}"
            raise UserError(f"{run_dir} has no {what} yet; see shardline slurm status {run_dir}.")
        if path != shown:
            shown, position = path, 0
        if path is not None:
            with path.open("rb") as file:
                position = min(position, path.stat().st_size)
                file.seek(position)
                os.write(1, file.read())
                position = file.tell()
        if not follow:
            if not position:
                print(f"{path} is empty so far", file=sys.stderr)
            return
        try:
            time.sleep(_LOOK_EVERY_S)
        except KeyboardInterrupt:
            return


def cancel(run_dir: Path, at_once: bool) -> None:
    """End a run's jobs: one that trains is asked to save and stop, unless at once; one that waits leaves the queue.

    Raises:
        UserError: no job of the run is there.
    """
    known = queued_jobs()
    found = False
    for job in jobs_of(run_dir):
        for number, state in known.items():
            if not _is_of(number, job) or not state.is_active:
                continue
            found = True
            if state.state == "RUNNING" and not at_once and (run_dir / "lease.json").exists():
                RunFolder(run_dir).request_stop("shardline slurm cancel")
                print(f"job {number} saves and stops at the next step's edge; with --now Slurm ends it at once")
            else:
                call(["scancel", number])
                print(f"job {number} is cancelled")
    if not found:
        raise UserError(f"no job of {run_dir} waits or runs; nothing to cancel.")


def _table(folders: Sequence[Path]) -> str:
    known = queued_jobs()
    rows = [_HEADER, *(_cells(_facts(run_dir, job, known)) for run_dir, job in _submitted(folders, known))]
    if len(rows) == 1:
        return f"no run in {', '.join(map(str, folders))} was submitted yet"
    reasons = {job.reason for job in (known.get(row[1]) for row in rows) if job is not None and job.state == "PENDING"}
    meanings = [f"{reason}: {meaning}" for reason in sorted(reasons) if (meaning := meaning_of(reason))]
    return "\n".join([text_table(rows), *([""] if meanings else []), *meanings])


def _submitted(folders: Sequence[Path], known: Mapping[str, QueuedJob]) -> Iterator[tuple[Path, str]]:
    """Each run's folder and newest job; of an array, each task that Slurm still knows."""
    for folder in folders:
        files = [folder / "slurm" / "jobs"] if (folder / "slurm").exists() else sorted(folder.glob("*/slurm/jobs"))
        for run_dir in (file.parent.parent for file in files):
            jobs = jobs_of(run_dir)
            if not jobs:
                continue
            tasks = [number for number in known if number.startswith(f"{jobs[-1]}_")]
            for number in sorted(tasks, key=lambda number: int(number.rpartition("_")[2])) or [jobs[-1]]:
                yield _run_of(run_dir, number), number


def _run_of(run_dir: Path, number: str) -> Path:
    """A task's own run: named in its command line, from the submission."""
    task = number.rpartition("_")[2] if "_" in number else ""
    if not task:
        return run_dir
    script = sorted((run_dir / "slurm").glob("submission-*/submit.sh"))[-1].read_text()
    name = script.rpartition("name=")[2].split()[0].rstrip("')\"")
    return run_dir.parent / name.replace("{task}", task)


def _facts(run_dir: Path, number: str, known: Mapping[str, QueuedJob]) -> dict[str, Any]:
    """What a run and its job are doing, for programs."""
    run_folder = RunFolder(run_dir)
    job = known.get(number)
    outcome = run_folder.read_outcome()
    line = last_metrics(run_folder.metrics_file)
    num_starts = run_folder.newest_attempt()
    step, num_steps, left_s = line.get("step", 0), None, None
    speed = line.get("throughput/tokens_per_s")
    if num_starts:
        config = run_folder.newest_config()
        num_steps = config.num_steps if config.is_length_known else None
        if speed and num_steps and job is not None and job.state == "RUNNING":
            left_s = num_positions_after(config, step) / speed
    state = job.state if job is not None else "-"
    if job is None or not job.is_active:
        # Slurm calls a job that stopped and saved a failed one; the run knows better.
        state = str(outcome["status"]).upper() if outcome is not None else state
    return {
        "run": run_dir.name,
        "path": str(run_dir),
        "job": number,
        "state": state,
        "reason": job.reason if job is not None and job.state == "PENDING" else None,
        "nodes": (job.nodes or None) if job is not None else None,
        "step": step if num_starts else None,
        "num_steps": num_steps,
        "train_loss": line.get("train/loss"),
        "tokens_per_s": speed,
        "time_left_s": left_s,
        "limit_in": (job.time_left or None) if job is not None and job.state == "RUNNING" else None,
        "num_starts": num_starts,
    }


def _cells(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    loss, speed, left_s = facts["train_loss"], facts["tokens_per_s"], facts["time_left_s"]
    total = "" if facts["num_steps"] is None else f"/{facts['num_steps']}"
    return (
        facts["run"],
        facts["job"],
        f"PENDING ({facts['reason']})" if facts["state"] == "PENDING" else facts["state"],
        facts["nodes"] or "-",
        "-" if facts["step"] is None else f"{facts['step']}{total}",
        "-" if loss is None else f"{loss:.4f}",
        "-" if speed is None else f"{speed:,.0f}",
        "-" if left_s is None else duration_text(left_s),
        facts["limit_in"] or "-",
        str(facts["num_starts"]),
    )


def _log(run_dir: Path, rank: int | None) -> Path | None:
    if rank is None:
        jobs = jobs_of(run_dir)
        path = run_dir / "slurm" / f"job-{jobs[-1]}.out" if jobs else None
    else:
        run_folder = RunFolder(run_dir)
        path = run_folder.log_dir(run_folder.newest_attempt()) / f"rank-{rank}.log"
    return path if path is not None and path.exists() else None


def _is_of(number: str, job: str) -> bool:
    return number == job or number.startswith(f"{job}_")
