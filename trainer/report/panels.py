"""The plots of a report: those that it shares with the wandb dashboard, and one for every other metric there is."""

from collections.abc import Iterable
from dataclasses import dataclass

from trainer.dashboard_panels import SECTIONS, Panel
from trainer.report.curves import Column, Curves

# A horizontal axis, and so no plot of its own.
_AXIS = "train/tokens"
# Drawn into the same plot, so that training and evaluation can be compared.
_LOSS = Panel("Loss", ("train/loss", "eval/loss"), "nats per token")
_SECTION_OF_PREFIX = {
    "train": "Learning rate and gradient norm",
    "eval": "Evaluation",
    "throughput": "Throughput",
    "memory": "Memory",
    "time": "Time shares",
    "goodput": "Time shares",
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
    "_loss": "nats per token",
    "/loss": "nats per token",
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
        order: place of its section.
        section: heading above it.
        title: what is plotted.
        unit: unit of the vertical axis.
        tick_format: d3 format of the vertical axis; empty leaves it to plotly.
        can_be_log: whether all values are positive.
        is_log: whether it starts with a logarithmic axis.
        stacked: whether its lines are shares that add up to 1.
        lines: its curves.
    """

    id: str
    order: int
    section: str
    title: str
    unit: str
    tick_format: str
    can_be_log: bool
    is_log: bool
    stacked: bool
    lines: list[Line]


def panel_views(runs: list[Curves]) -> list[PanelView]:
    """The plots that these runs have numbers for, in order."""
    names = sorted({name for run in runs for name, column in run.columns.items() if column.finite()} - {_AXIS})
    plots: list[tuple[int, str, Panel, list[str]]] = []
    shown: set[str] = set()
    titles = [section.title for section in SECTIONS]
    for order, section in enumerate(SECTIONS):
        for panel in section.panels:
            found = (_LOSS if panel.metrics == ("train/loss",) else panel).matching(names)
            if found:
                plots.append((order, section.title, _LOSS if "train/loss" in panel.metrics else panel, found))
                shown |= set(found)
    for name in names:
        if name not in shown:
            section_title = _SECTION_OF_PREFIX.get(name.partition("/")[0], _OTHER)
            order = titles.index(section_title) if section_title in titles else len(titles)
            plots.append((order, section_title, Panel(_title(name), (name,), _unit(name)), [name]))
    plots.sort(key=lambda plot: plot[0])
    return [_view(f"p{number}", *plot, runs) for number, plot in enumerate(plots)]


def _view(identity: str, order: int, section: str, panel: Panel, names: list[str], runs: list[Curves]) -> PanelView:
    values = [value for run in runs for name in names for value in run.columns.get(name, Column()).values]
    can_be_log = not panel.stacked and not any(value <= 0 for value in values)
    is_share = panel.unit.startswith("share") or all(name.endswith("_fraction") for name in names)
    return PanelView(
        id=identity,
        order=order,
        section=section,
        title=panel.title,
        unit=panel.unit,
        tick_format=".1~%" if is_share else "",
        can_be_log=can_be_log,
        is_log=can_be_log and panel.scale == "log",
        stacked=panel.stacked,
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
        return rest[0]
    return name.rpartition("/")[2].removesuffix("_fraction").replace("_", " ")


def _title(name: str) -> str:
    words = name.partition("/")[2] or name
    for suffix in ("_fraction", "_percent", "_gib", "_ms", "_s"):
        words = words.removesuffix(suffix) if not words.endswith("_per_s") else words
    words = words.replace("/", " ").replace("_", " ").strip()
    return words[:1].upper() + words[1:] if words else name


def _unit(name: str) -> str:
    return next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix)), "value")
