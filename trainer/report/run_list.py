"""The runs below a folder, each in a line. Imports no torch."""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sharding.ranks.errors import UserError
from trainer.config import RunConfig
from trainer.metrics.file import last_metrics
from trainer.report.evaluations import Judged, judge
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.lease import read_holder
from trainer.run_folder.lease_holder import Verdict
from trainer.run_folder.lease_holder import judge as judge_holder
from trainer.runtime.byte_sizes import size_text
from trainer.runtime.text_table import text_table

# Runs of drills and benchmarks lie deeper than others.
_MAX_DEPTH = 4
_HEADER = ("RUN", "STATE", "STEP", "BEST EVALUATION", "CHANGED", "SIZE")


@dataclass(frozen=True)
class ListedRun:
    """One run.

    Attributes:
        run: its folder below the one that was listed.
        path: its folder.
        state: running, finished, stopped, failed, bad_input, killed, submitted, new, or unknown: another machine holds
            it, and cannot be asked.
        step: its last step that is known of.
        num_steps: step at which it is finished; None where that is not known.
        evaluation: what its evaluations came to.
        changed_at: when something of it was written last, in seconds since 1970.
        num_bytes: what lies in its folder; not what lies in a storage.
    """

    run: str
    path: str
    state: str
    step: int
    num_steps: int | None
    evaluation: Judged
    changed_at: float
    num_bytes: int

    def values(self) -> dict[str, Any]:
        """It for programs."""
        return asdict(self) | {"changed_at": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self.changed_at))}

    def cells(self, now: float) -> tuple[str, ...]:
        """It for people."""
        judged, steps = self.evaluation, f"{self.step}" if self.num_steps is None else f"{self.step}/{self.num_steps}"
        if judged.best is not None:
            evaluation = f"{judged.metric} {judged.best:.4f} ({judged.best_step})"
        else:
            evaluation = "-" if judged.last is None else f"{judged.metric} {judged.last:.4f}, last ({judged.last_step})"
        return (self.run, self.state, steps, evaluation, _age(now - self.changed_at), size_text(self.num_bytes))


def list_runs(folder: Path) -> list[ListedRun]:
    """The runs below a folder, or the run that it is, the latest first.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name the one that runs are in, the output_dir of their configuration.")
    runs = [_read(path, folder) for path in _run_dirs(folder, _MAX_DEPTH)]
    return sorted(runs, key=lambda run: -run.changed_at)


def runs_text(runs: Sequence[ListedRun], folder: Path) -> str:
    """Them for people."""
    if not runs:
        return f"no run in {folder}"
    now = time.time()
    return text_table([_HEADER, *(run.cells(now) for run in runs)], right=(2, 4, 5))


def _run_dirs(folder: Path, depth: int) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
    elif depth:
        try:
            inner = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())
        except OSError:
            return
        for path in inner:
            yield from _run_dirs(path, depth - 1)


def _is_run(folder: Path) -> bool:
    has_config = (folder / "config.yaml").is_file() and any(
        (folder / name).exists() for name in ("logs", "checkpoints", "metrics.jsonl")
    )
    return has_config or (folder / "slurm" / "jobs").exists()


def _read(path: Path, below: Path) -> ListedRun:
    folder, config = RunFolder(path), _config(path)
    outcome = folder.read_outcome() or {}
    step = max(int(last_metrics(folder.metrics_file).get("step", 0)), int(outcome.get("step") or 0))
    metric = "loss" if config is None else config.evaluation.monitor
    num_bytes, changed_at = _extent(path)
    return ListedRun(
        run=str(path.relative_to(below)) if path != below else path.resolve().name,
        path=str(path),
        state=_state(folder, outcome),
        step=step,
        num_steps=config.num_steps if config is not None and config.is_length_known else None,
        evaluation=judge(path, metric, _evaluations(folder.metrics_file, metric)),
        changed_at=changed_at,
        num_bytes=num_bytes,
    )


def _config(path: Path) -> RunConfig | None:
    try:
        return RunFolder(path).newest_config()
    except (UserError, OSError):
        # Not begun, or of a release whose settings this one does not know.
        return None


def _state(folder: RunFolder, outcome: dict[str, Any]) -> str:
    try:
        holder = read_holder(folder.path)
    except OSError:
        holder = None
    if holder is not None:
        verdict = judge_holder(holder)
        # What Slurm does not say to be over is there still.
        if verdict is Verdict.ALIVE or (verdict is Verdict.UNKNOWN and holder.get("slurm_job")):
            return "running"
        if verdict is Verdict.UNKNOWN:
            return "unknown"
    if outcome.get("status"):
        return str(outcome["status"])
    if folder.newest_attempt():
        # Whoever ends by itself says how.
        return "killed"
    return "submitted" if (folder.path / "slurm" / "jobs").exists() else "new"


def _evaluations(path: Path, metric: str) -> Iterator[tuple[int, float]]:
    """Step and finite value of each evaluation, of a file that may be growing, or not there yet."""
    name = f"eval/{metric}"
    marker = json.dumps(name).encode()
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        for line in file:
            # Most lines have none, and a long run has many.
            if marker not in line:
                continue
            try:
                values = json.loads(line)
                step, value = int(values["step"]), float(values[name])
            except (ValueError, TypeError, KeyError):
                continue
            if math.isfinite(value):
                yield step, value


def _extent(folder: Path) -> tuple[int, float]:
    """Bytes of what lies in a folder, and when it was written last."""
    num_bytes, changed_at = 0, 0.0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                facts = os.lstat(os.path.join(place, name))
            except OSError:
                # A checkpoint may be on its way out.
                continue
            num_bytes += facts.st_size
            # Reports and locks are written by whoever looks.
            if name not in ("report.html", "goodput.json", ".lease.lock"):
                changed_at = max(changed_at, facts.st_mtime)
    return num_bytes, changed_at or folder.stat().st_mtime


def _age(seconds: float) -> str:
    minutes = int(seconds // 60)
    if minutes < 1:
        return "now"
    if minutes < 60:
        return f"{minutes} min ago"
    return f"{minutes // 60} h ago" if minutes < 48 * 60 else f"{minutes // (24 * 60)} d ago"
