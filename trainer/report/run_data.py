"""What a report shows of one run, read from its folder."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sharding.ranks.errors import UserError
from trainer.config.frozen_config import flatten
from trainer.faults.failure.record import Failure, read_failure
from trainer.metrics.goodput import Goodput, read_goodput
from trainer.report.attempts import Attempt, read_attempts, read_json, read_yaml
from trainer.report.class_rows import ClassRows, read_class_rows
from trainer.report.curves import Curves, read_curves
from trainer.report.evaluations import Judged, judge, monitored
from trainer.report.event_rows import EventRow, event_rows
from trainer.report.excerpts import Excerpt, read_excerpts
from trainer.runtime.durations import duration_text

_BILLION = 1e9


@dataclass(frozen=True)
class Headline:
    """One number that sums up a run.

    Attributes:
        title: what it is.
        value: the number, for people, with its unit.
        note: where it comes from, such as its step.
    """

    title: str
    value: str
    note: str


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        label: what tells it from the other runs of the report.
        path: its folder as it was given.
        config: its configuration, flat.
        outcome: how the last attempt ended; empty where nobody could say, or it has not ended.
        attempts: its attempts.
        curves: its metrics.
        excerpts: texts.
        events: what was out of the ordinary.
        classes: scores of each class; None where there are none.
        failure: why the last attempt failed; None where it did not, or nobody could say.
        goodput: what its time was spent on; None where no attempt has told.
    """

    label: str
    path: Path
    config: dict[str, Any]
    outcome: dict[str, Any]
    attempts: list[Attempt]
    curves: Curves
    excerpts: list[Excerpt]
    events: list[EventRow]
    goodput: Goodput | None
    classes: ClassRows | None = None
    failure: Failure | None = None

    @property
    def status(self) -> str:
        """How it ended, in a word."""
        return str(self.outcome.get("status", "no outcome"))

    @property
    def description(self) -> str:
        """What its log says of the model and how it is sharded."""
        return next((attempt.model for attempt in reversed(self.attempts) if attempt.model), "")

    def headlines(self) -> list[Headline]:
        """The numbers at the top; those that nobody measured are a dash."""
        curves = self.curves
        return [
            _at_step("Final loss", curves.last("train/loss"), "{:.4f}"),
            self._best(),
            self._tokens(),
            self._tokens_per_s(),
            self._wall_time(),
            self._peak_memory(),
        ]

    @property
    def newest_config(self) -> dict[str, Any]:
        """The configuration of its last attempt that left one, flat."""
        return next((attempt.config for attempt in reversed(self.attempts) if attempt.config), self.config)

    @property
    def judged(self) -> Judged:
        """What its evaluations came to."""
        metric = monitored(self.newest_config)
        return judge(self.path, metric, self.curves.points(f"eval/{metric}"))

    def finite(self, metric: str) -> list[float]:
        """The values of a metric that are numbers."""
        column = self.curves.columns.get(metric)
        return column.finite() if column is not None else []

    def _best(self) -> Headline:
        judged = self.judged
        title = f"Best evaluation {judged.metric}"
        if judged.best is None or judged.best_step is None:
            return _missing(title)
        return Headline(title, f"{judged.best:.4f}", f"step {judged.best_step:,}, {judged.better} is better")

    def _tokens(self) -> Headline:
        point = self.curves.last("train/tokens")
        if point is None or point[1] < _BILLION:
            return _at_step("Tokens", point, "{:,.0f}")
        return Headline("Tokens", f"{point[1] / _BILLION:,.2f} billion", f"step {point[0]:,}")

    def _tokens_per_s(self) -> Headline:
        values = self.finite("throughput/tokens_per_s")
        mfu = self.finite("throughput/mfu")
        note = f"median, {median(mfu):.1%} MFU" if mfu else "median"
        return Headline("Tokens/s", f"{median(values):,.0f}", note) if values else _missing("Tokens/s")

    def _wall_time(self) -> Headline:
        durations = [attempt.duration_s for attempt in self.attempts]
        known = [duration for duration in durations if duration is not None]
        if not known:
            return _missing("Wall time")
        count = f"{len(known)} of {len(durations)} attempts" if len(known) < len(durations) else ""
        whole = "1 attempt" if len(durations) == 1 else f"{len(durations)} attempts"
        return Headline("Wall time", duration_text(sum(known)), count or whole)

    def _peak_memory(self) -> Headline:
        values = self.finite("memory/peak_gib")
        return Headline("Peak memory", f"{max(values):.2f} GiB", "one rank") if values else _missing("Peak memory")


def read_runs(paths: list[Path]) -> list[RunData]:
    """Read several run folders.

    Raises:
        UserError: a path is no run folder, or is given twice.
    """
    resolved = [path.resolve() for path in paths]
    for path, place in zip(paths, resolved, strict=True):
        if not (path / "config.yaml").exists():
            raise UserError(f"{path} is not a run folder: it has no config.yaml; check the path.")
        if resolved.count(place) > 1:
            raise UserError(f"{path} is given twice; name each run once.")
    labels = distinct_labels(resolved)
    return [_read_run(path, label) for path, label in zip(paths, labels, strict=True)]


def distinct_labels(paths: list[Path]) -> list[str]:
    """The end of each path, as long as it takes to tell them apart."""
    for length in range(1, max(len(path.parts) for path in paths)):
        labels = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(labels)) == len(paths):
            return labels
    return [str(path) for path in paths]


def _read_run(path: Path, label: str) -> RunData:
    return RunData(
        label=label,
        path=path,
        config=flatten(read_yaml(path / "config.yaml")),
        outcome=read_json(path / "outcome.json"),
        attempts=read_attempts(path),
        curves=read_curves(path / "metrics.jsonl"),
        excerpts=read_excerpts(path),
        events=event_rows(path),
        classes=read_class_rows(path),
        failure=read_failure(path),
        goodput=read_goodput(path),
    )


def _at_step(title: str, point: tuple[int, float] | None, form: str) -> Headline:
    return Headline(title, form.format(point[1]), f"step {point[0]:,}") if point is not None else _missing(title)


def _missing(title: str) -> Headline:
    return Headline(title, "-", "not measured")
