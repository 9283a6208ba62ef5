"""A report as one self-contained HTML file."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.frozen_config import flatten
from trainer.files.atomic_files import write_atomically
from trainer.report.attempts import Attempt
from trainer.report.curves import MAX_POINTS, Curves, thin, training_hours
from trainer.report.goodput_rows import goodput_bar, goodput_rows
from trainer.report.panels import PanelView, section_views
from trainer.report.ranking import rank_runs, value_text
from trainer.report.run_data import RunData, read_runs
from trainer.runtime.durations import duration_text

_FOLDER = Path(__file__).resolve().parent
_DIGITS = 7
# As in page.css and page.js.
_NUM_COLOURS = 8


@dataclass(frozen=True)
class TableRow:
    """One setting or fact, with its value in each run."""

    key: str
    values: list[str]
    differs: bool


@dataclass(frozen=True)
class AttemptRow:
    """One attempt, as text."""

    number: int
    started: str
    began_after: str
    duration: str
    ranks: str
    changes: list[str]


def write_report(run_dirs: Sequence[Path], target: Path) -> list[RunData]:
    """Write the report of one run, or of several compared.

    Returns:
        What it shows.

    Raises:
        UserError: a folder is no run folder, or is given twice.
        OSError: the file cannot be written.
    """
    runs = read_runs(list(run_dirs))
    # As bytes: a metric's or a document's name may hold what no encoding has.
    write_atomically(target, render(runs).encode(errors="replace"))
    return runs


def render(runs: list[RunData]) -> str:
    """The page."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    sections = section_views([run.curves for run in runs])
    panels = [panel for section in sections for panel in section.panels]
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("page.html")
    return page.render(
        runs=runs,
        ranking=rank_runs(runs) if len(runs) > 1 else None,
        title=runs[0].label if len(runs) == 1 else f"{len(runs)} runs compared",
        sections=sections,
        axes=_axes([run.curves for run in runs]),
        settings=table_rows([run.config for run in runs]),
        facts=table_rows([_facts(run) for run in runs]),
        goodput_rows=goodput_rows([run.goodput for run in runs]),
        goodput_bars=[goodput_bar(run.goodput) if run.goodput is not None else None for run in runs],
        attempts=[attempt_rows(run.attempts) for run in runs],
        num_thinned=max((len(run.curves.steps) for run in runs), default=0),
        max_points=MAX_POINTS,
        num_colours=_NUM_COLOURS,
        num_unreadable=sum(run.curves.num_unreadable for run in runs),
        written_at=time.strftime("%Y-%m-%d %H:%M %Z"),
        # These are ours, and the data cannot end its element: see _embed.
        style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),  # noqa: S704
        script=Markup((_FOLDER / "page.js").read_text(encoding="utf-8")),  # noqa: S704
        plotly=Markup(get_plotlyjs()),  # noqa: S704
        data=Markup(_embed(_plot_data(runs, panels))),  # noqa: S704
    )


def table_rows(columns: list[dict[str, Any]]) -> list[TableRow]:
    """Flat mappings side by side, with those keys marked whose values are not all equal."""
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = []
    for key in keys:
        values = [value_text(column[key]) if key in column else "not set" for column in columns]
        rows.append(TableRow(key, values, differs=len(set(values)) > 1))
    return rows


def attempt_rows(attempts: list[Attempt]) -> list[AttemptRow]:
    """Attempts as text, each with the settings in which it differs from the one before."""
    rows = []
    before: dict[str, Any] = {}
    for attempt in attempts:
        changed = [
            f"{key}: {value_text(before.get(key))} to {value_text(attempt.config.get(key))}"
            for key in sorted(before.keys() | attempt.config.keys())
            if before and attempt.config and before.get(key) != attempt.config.get(key)
        ]
        before = attempt.config or before
        rows.append(
            AttemptRow(
                number=attempt.number,
                started=str(attempt.provenance.get("time", "unknown")).replace("T", " ", 1),
                began_after=_began(attempt.began_after),
                duration="unknown" if attempt.duration_s is None else duration_text(attempt.duration_s),
                ranks=str(attempt.provenance.get("num_ranks", "unknown")),
                changes=changed,
            )
        )
    return rows


def _began(step: int | None) -> str:
    if step is None:
        return "unknown"
    return f"after step {step:,}" if step else "from the start"


def _facts(run: RunData) -> dict[str, Any]:
    """Hardware and provenance of the last attempt that left any; of a diff, the files."""
    provenance = next((attempt.provenance for attempt in reversed(run.attempts) if attempt.provenance), {})
    facts = flatten(provenance)
    diff = facts.get("code.git_diff")
    if isinstance(diff, str):
        files = [line.rpartition(" b/")[2] for line in diff.splitlines() if line.startswith("diff --git ")]
        facts["code.git_diff"] = ", ".join(files) or "nothing"
    for key, separator in (("argv", " "), ("hardware.gpus", ", ")):
        if isinstance(facts.get(key), list):
            facts[key] = separator.join(map(str, facts[key])) or "none"
    if facts.get("code.git_untracked") == "":
        facts["code.git_untracked"] = "nothing"
    return facts


def _axes(curves: list[Curves]) -> list[tuple[str, str]]:
    """Key and name of each x axis that some run has numbers for."""
    axes = [("step", "Step")]
    if any(one.last("train/tokens") for one in curves):
        axes.append(("tokens", "Tokens"))
    if any(one.last("throughput/step_time_s") for one in curves):
        axes.append(("hours", "Hours"))
    return axes


def _plot_data(runs: list[RunData], panels: list[PanelView]) -> dict[str, Any]:
    return {
        "runs": [_run_data(run, {line.metric for panel in panels for line in panel.lines}) for run in runs],
        "panels": {
            panel.id: {
                "unit": panel.unit,
                "tick_format": panel.tick_format,
                "log": panel.is_log,
                "nonnegative": panel.nonnegative,
                "small": panel.small,
                "stacked": panel.stacked,
                "lines": [
                    {"metric": line.metric, "label": line.label, "smooth": line.smooth, "marked": line.marked}
                    for line in panel.lines
                ],
            }
            for panel in panels
        },
    }


def _run_data(run: RunData, metrics: set[str]) -> dict[str, Any]:
    """Curves as positions in axes that they share, which hold only the rows that some curve needs."""
    curves = run.curves
    chosen = {name: thin(column.values) for name, column in curves.columns.items() if name in metrics}
    rows_of: dict[str, Callable[[int], int]] = {name: curves.columns[name].rows.__getitem__ for name in chosen}
    used = sorted(
        {rows_of[name](i) for name, one in chosen.items() for i in [*one.kept, *(one.means[0] if one.means else ())]}
    )
    place = {row: index for index, row in enumerate(used)}
    tokens = curves.columns.get("train/tokens")
    tokens_at = dict(zip(tokens.rows, tokens.values, strict=True)) if tokens is not None else {}
    hours = training_hours(curves)
    series: dict[str, Any] = {}
    for name, one in chosen.items():
        column = curves.columns[name]
        series[name] = {
            "rows": [place[column.rows[i]] for i in one.kept],
            "values": [_short(column.values[i]) for i in one.kept],
        }
        if one.means is not None:
            series[name]["mean_rows"] = [place[column.rows[i]] for i in one.means[0]]
            series[name]["means"] = [_short(value) for value in one.means[1]]
    return {
        "label": run.label,
        "axes": {
            "step": [curves.steps[row] for row in used],
            "tokens": [_short(tokens_at.get(row)) for row in used],
            "hours": [_short(hours[row]) for row in used],
        },
        "series": series,
    }


def _short(value: float | None) -> float | None:
    """A number with the digits that a plot can show."""
    return None if value is None or math.isnan(value) else float(f"{value:.{_DIGITS}g}")


def _embed(values: dict[str, Any]) -> str:
    """JSON inside an HTML element: without these characters nothing in it can end the element or begin a comment."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
