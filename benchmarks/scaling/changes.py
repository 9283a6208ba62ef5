"""A scaling result beside the one before it, by ratios: a machine that is busier slows everyone alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure.comparison import Change, changes_markdown, difference_of_setup
from benchmarks.measure.starts import change_of_ratio, ratio_over_starts
from benchmarks.presentation.result_files import RESULTS, last_result, name_of, read_rows
from benchmarks.scaling.races import EXTRA, OURS, REFERENCE, RaceResult, read_races


def changes_of(raw: Path) -> list[str]:
    """Lines that say what has changed since the last result; none where there is none that was measured alike."""
    before = last_result(raw, [raw.parent.parent, RESULTS])
    if before is None:
        return []
    rows, old_rows = read_rows(raw), read_rows(before)
    if rows[0]["setup"].get("protocol") != old_rows[0].get("setup", {}).get("protocol"):
        return []
    changes = ratio_changes(read_races(rows), read_races(old_rows))
    lines = changes_markdown(changes, name_of(before), difference_of_setup(rows[0], old_rows[0]))
    return [
        "Of ours, over each peer of the same race; of peers, over the plain loop. Where a peer that nobody has changed "
        "moves as well, it is the machine.",
        "",
        *lines,
    ]


def ratio_changes(now: Sequence[RaceResult], before: Sequence[RaceResult]) -> list[Change]:
    """The change of every ratio that both results have."""
    earlier = {race.label: race for race in before}
    return [
        change
        for race in now
        if race.label in earlier
        for name in race.contestants
        for other in race.contestants
        if other != name and (other == REFERENCE or (name in OURS and other not in OURS))
        for change in _change(race, earlier[race.label], name, other)
    ]


def _change(race: RaceResult, before: RaceResult, name: str, other: str) -> list[Change]:
    if not {name, other} <= before.times.keys() or EXTRA in (name, other):
        return []
    sides: list[Any] = [(one.times[name], one.times[other]) for one in (race, before)]
    new, old = (ratio_over_starts(*pair).value for pair in sides)
    return [Change(f"{race.label} {name} / {other}", old, new, change_of_ratio(*sides))]
