"""Several runs in order: which was best, what sets it apart, how fast it was. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from trainer.report.evaluations import Judged
from trainer.report.run_data import RunData
from trainer.runtime.text_table import text_table

# Where things lie and what is written, which changes nothing of what is trained.
_NOT_COMPARED = ("name", "output_dir", "tracking", "launch", "metrics", "data.cache_dir", "data.num_workers")
_FOLDERS = ("task.folder", "model.folder", "data.folder")
# Sections whose keys are the user's own, of which one run may have some that another has not.
_OPEN_SECTIONS = ("model.config.", "model.arguments.", "task.options.", "data.arguments.")
# What evaluation reads, and how.
_OF_EVALUATION = ("data.", "task.", "model.pretrained", "evaluation.max_sequences")
# Of runs that are unlike, all of them would bury the table.
_MOST_SETTINGS = 8


@dataclass(frozen=True)
class RankedRun:
    """One run among others.

    Attributes:
        rank: its place, from 1; None where it has none.
        label: what tells it from the others.
        index: its place as the runs were named, from 0.
        path: its folder.
        status: how it ended, in a word.
        settings: those in which the runs differ, as text.
        judged: what its evaluations came to.
        tokens_per_s: median over its log intervals; None where it was not measured.
    """

    rank: int | None
    label: str
    index: int
    path: str
    status: str
    settings: dict[str, str]
    judged: Judged
    tokens_per_s: float | None

    @property
    def shown_settings(self) -> tuple[list[str], list[str]]:
        """As ``key=value``, those to show at once, and the rest, of which there is never one alone."""
        texts = [f"{key}={value}" for key, value in self.settings.items()]
        number = len(texts) if len(texts) <= _MOST_SETTINGS + 1 else _MOST_SETTINGS
        return texts[:number], texts[number:]

    def cells(self) -> tuple[str, ...]:
        """All but the settings, as text."""
        best = "-" if self.judged.best is None else f"{self.judged.best:.4f}"
        step = "-" if self.judged.best_step is None else f"{self.judged.best_step:,}"
        speed = "-" if self.tokens_per_s is None else f"{self.tokens_per_s:,.0f}"
        return ("-" if self.rank is None else str(self.rank), self.label, self.status, best, step, speed)


@dataclass(frozen=True)
class Ranking:
    """Runs, the best first.

    Attributes:
        title: heading of the column of best evaluations.
        runs: in order; where they have none, as they were named.
        notes: what is to be known of the comparison, a sentence each.
    """

    title: str
    runs: list[RankedRun]
    notes: list[str]

    def text(self, *, narrow: bool) -> str:
        """The table for a terminal.

        Args:
            narrow: put each setting on a line of its own, below the run's first.
        """
        rows: list[tuple[str, ...]] = [("", "run", "state", self.title, "step", "tokens/s", "settings that differ")]
        for run in self.runs:
            settings, more = run.shown_settings
            settings = [*settings, *([f"and {len(more)} more"] if more else [])] or ["-"]
            if narrow:
                rows.append((*run.cells(), settings[0]))
                rows += [("",) * 6 + (setting,) for setting in settings[1:]]
            else:
                rows.append((*run.cells(), " ".join(settings)))
        return "\n".join([text_table(rows, right=(0, 3, 4, 5)), *(f"note: {note}" for note in self.notes)])

    def values(self) -> dict[str, Any]:
        """It for programs."""
        return {"runs": [asdict(run) for run in self.runs], "notes": self.notes}


def rank_runs(runs: Sequence[RunData]) -> Ranking:
    """Put runs in order of their best evaluation, where they have an order."""
    configs = [run.newest_config for run in runs]
    keys = _differing(configs)
    judged = [run.judged for run in runs]
    metrics, notes = sorted({one.metric for one in judged}), []
    better = judged[0].better
    if len(metrics) > 1:
        notes.append(f"the runs are judged by different metrics ({', '.join(metrics)}), so they have no order")
    elif better is None:
        notes.append(f"which direction of {metrics[0]} is better was not recorded, so the runs have no order")
    has_order = len(metrics) == 1 and better is not None
    title = f"best {metrics[0]} ({better})" if has_order else "best"
    order = list(range(len(runs)))
    if has_order:
        sign = 1.0 if better == "lower" else -1.0
        order.sort(key=lambda index: _sort_key(judged[index], sign))
        if any(one.best is None for one in judged):
            notes.append("runs without an evaluation have no place")
        if changed := [key for key in keys if key.startswith(_OF_EVALUATION)]:
            named = changed if len(changed) <= _MOST_SETTINGS + 1 else changed[:_MOST_SETTINGS]
            more = f" and {len(changed) - len(named)} more" if len(changed) > len(named) else ""
            notes.append(f"the runs differ in {', '.join(named)}{more}: they may have been evaluated on other samples")
    ranked = []
    for place, index in enumerate(order, 1):
        run = runs[index]
        ranked.append(
            RankedRun(
                rank=place if has_order and judged[index].best is not None else None,
                label=run.label,
                index=index,
                path=str(run.path),
                status=run.status,
                settings={key: value_text(configs[index].get(key)) for key in keys},
                judged=judged[index],
                tokens_per_s=median(values) if (values := run.finite("throughput/tokens_per_s")) else None,
            )
        )
    return Ranking(title, ranked, notes)


def value_text(value: Any) -> str:
    """A setting as a person reads it."""
    if value is None:
        return "null"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _sort_key(judged: Judged, sign: float) -> tuple[bool, float]:
    return judged.best is None, sign * (judged.best or 0.0)


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings that all runs have, or that are the user's own, and that are not equal in all."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [
        key
        for key in keys
        if not any(key == left_out or key.startswith(f"{left_out}.") for left_out in (*_NOT_COMPARED, *_FOLDERS))
        # One that some lack is of a release that others are older than.
        and (key.startswith(_OPEN_SECTIONS) or all(key in config for config in configs))
        and len({value_text(config.get(key)) for config in configs}) > 1
    ]
