"""The plots of a report: those that it shares with the wandb dashboard, and one for every other metric there is."""

from collections.abc import Iterable
from dataclasses import dataclass

from trainer.metrics.panels import SECTIONS, Panel
from trainer.report.curves import Column, Curves

# A horizontal axis, and so no plot of its own.
_AXIS = "train/tokens"
# Drawn into the same plot, so that training and evaluation can be compared.
_LOSS = Panel("Training and held-out loss", ("train/loss", "eval/loss"), "per target")
_LOSS_SECTION = "Loss and evaluation"
_SECTION_OF_PREFIX = {
    "train": "Learning rate and gradient norm",
    "eval": _LOSS_SECTION,
    "throughput": "Throughput",
    "memory": "Memory",
    "time": "Time shares",
    "goodput": "Time shares",
    "checkpoint": "Time shares",
    "system": "System",
}
_OTHER = "Other"
_UNITS = {
    "_fraction": "share",
    "_percent": "%",
    "_tokens_per_s": "tokens/s",
    "_per_s": "per second",
    "_s": "s",
    "_ms": "ms",
    "_gib": "GiB",
    "_bytes": "bytes",
    "_tokens": "tokens",
    "_steps": "steps",
    "_loss": "per target",
    "/loss": "per target",
    "/perplexity": "perplexity",
}
_PREFIX_LABELS = {"train": "training", "eval": "evaluation"}
# They are smooth, or exact as they stand.
_NOT_SMOOTHED = ("eval/", "memory/", "train/learning_rate", "train/skipped_steps", "goodput/")


@dataclass(frozen=True)
class Line:
    """One curve of a plot, for each run.

    Attributes:
        metric: its name in metrics.jsonl.
        label: what it is called in the plot.
        smooth: whether the smoothing control applies.
        marked: whether each point is marked.
    """

    metric: str
    label: str
    smooth: bool
    marked: bool


@dataclass(frozen=True)
class PanelView:
    """One plot as it is shown.

    Attributes:
        id: names it in the page.
        title: what is plotted.
        unit: unit of the vertical axis.
        tick_format: d3 format of the vertical axis; empty leaves it to plotly.
        nonnegative: whether no value is below 0.
        small: whether all values are below 1.
        can_be_log: whether all values are positive.
        is_log: whether it starts with a logarithmic axis.
        stacked: whether its lines are shares that add up to 1.
        is_wide: whether it has a row of its own.
        lines: its curves.
    """

    id: str
    title: str
    unit: str
    tick_format: str
    nonnegative: bool
    small: bool
    can_be_log: bool
    is_log: bool
    stacked: bool
    is_wide: bool
    lines: list[Line]


@dataclass(frozen=True)
class SectionView:
    """Plots under one heading."""

    title: str
    panels: list[PanelView]


def section_views(runs: list[Curves]) -> list[SectionView]:
    """The plots that these runs have numbers for, in order."""
    names = sorted({name for run in runs for name, column in run.columns.items() if column.finite()} - {_AXIS})
    chosen: dict[str, list[tuple[Panel, list[str]]]] = {}
    shown: set[str] = set()
    for section in SECTIONS:
        title = _LOSS_SECTION if section.title in ("Loss", "Evaluation") else section.title
        for panel in section.panels:
            drawn = _LOSS if panel.metrics == ("train/loss",) else panel
            if found := drawn.matching(names):
                chosen.setdefault(title, []).append((drawn, found))
                shown |= set(found)
        chosen.setdefault(title, [])
    for name in names:
        if name not in shown:
            title = _SECTION_OF_PREFIX.get(name.partition("/")[0], _OTHER)
            chosen.setdefault(title, []).append((Panel(_title(name), (name,), _unit(name)), [name]))
    sections: list[SectionView] = []
    for title, plots in chosen.items():
        first = sum(len(section.panels) for section in sections)
        # Two in a row; what the last row would leave empty goes to the loss, else to the last plot.
        wide = 0 if title == _LOSS_SECTION else len(plots) - 1
        views = [
            _view(f"p{first + place}", panel, found, runs, is_wide=len(plots) % 2 == 1 and place == wide)
            for place, (panel, found) in enumerate(plots)
        ]
        sections.append(SectionView(title, views))
    return [section for section in sections if section.panels]


def _view(identity: str, panel: Panel, names: list[str], runs: list[Curves], *, is_wide: bool) -> PanelView:
    values = [value for run in runs for name in names for value in run.columns.get(name, Column()).values]
    can_be_log = not panel.stacked and not any(value <= 0 for value in values)
    is_share = panel.unit.startswith("share") or all(name.endswith("_fraction") for name in names)
    return PanelView(
        id=identity,
        title=panel.title,
        unit=panel.unit,
        # Percent of two significant digits.
        tick_format=".2~p" if is_share else "",
        nonnegative=not any(value < 0 for value in values),
        small=not any(abs(value) >= 1 for value in values),
        can_be_log=can_be_log,
        is_log=can_be_log and panel.scale == "log",
        stacked=panel.stacked,
        is_wide=is_wide,
        lines=[
            Line(
                metric=name,
                label=_label(name, names) if len(names) > 1 else panel.title,
                smooth=not panel.stacked and not name.startswith(_NOT_SMOOTHED),
                marked=name.startswith("eval/"),
            )
            for name in names
        ],
    )


def _label(name: str, names: Iterable[str]) -> str:
    """What tells a metric from the others of its plot."""
    prefix, *rest = name.split("/")
    if len({other.partition("/")[0] for other in names}) > 1:
        return _PREFIX_LABELS.get(prefix, prefix)
    if len(rest) > 1:
        # Of a node, or of a class.
        return rest[0] if prefix == "system" else "/".join(rest[1:])
    return name.rpartition("/")[2].removesuffix("_fraction").replace("_", " ").replace("mfu", "MFU")


def _title(name: str) -> str:
    words = name.partition("/")[2] or name
    for suffix in ("_fraction", "_percent", "_gib", "_ms", "_s"):
        words = words.removesuffix(suffix) if not words.endswith("_per_s") else words
    words = words.replace("/", " ").replace("_", " ").strip()
    return words[:1].upper() + words[1:] if words else name


def _unit(name: str) -> str:
    return next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix)), "value")
