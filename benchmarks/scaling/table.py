"""What ``shardline bench scaling`` has found, from its raw rows: tables, verdicts, a plot."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from benchmarks.contestants.field import BUCKETED
from benchmarks.measure.comparison import Series, ratio_of_independent
from benchmarks.measure.step_profile import CATEGORIES, verdict
from benchmarks.presentation.facts import facts
from benchmarks.presentation.plots import Panel, Point, line_panels
from benchmarks.scaling.plan import MODES
from trainer.metrics.paired_times import Ratio, ratio_of_medians

REFERENCE = "plain"
TARGET = 1.03
"""Upper end of the interval of Shardline's ratio to the plain loop of the same strategy."""

_OURS = ("shardline", BUCKETED)
_ORDER = (REFERENCE, *_OURS, "deepspeed", "accelerate", "fabric", "transformers")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class RaceResult:
    """One race as it was measured.

    Attributes:
        label: its name.
        strategy: what all contestants did.
        num_ranks: ranks.
        modes: weak, strong, or both.
        tokens_per_step: over all ranks.
        times: each contestant's step times in seconds, one per round, of the slowest rank.
        loss_differences: from the plain loop, the largest, relative.
        profiles: by contestant shares of a profiled step, mean over ranks; see ``StepProfile.shares``.
    """

    label: str
    strategy: str
    num_ranks: int
    modes: Sequence[str]
    tokens_per_step: int
    times: dict[str, list[float]]
    loss_differences: dict[str, float]
    profiles: dict[str, dict[str, float]]

    def tokens_per_s(self, name: str) -> float:
        """Of one contestant, over all ranks."""
        return self.tokens_per_step / median(self.times[name])

    def ratio(self, name: str) -> Ratio | None:
        """A contestant's step over the plain loop's; None for the plain loop, or where it did not take part."""
        if name == REFERENCE or REFERENCE not in self.times:
            return None
        return ratio_of_medians(self.times[name], self.times[REFERENCE])


def read_races(rows: Sequence[Row]) -> list[RaceResult]:
    """All races that have at least one pair."""
    races = []
    for race in (row for row in rows if row["kind"] == "race"):
        own = [row for row in rows if row.get("race") == race["race"]]
        rounds = [row for row in own if row["kind"] == "round"]
        if not rounds:
            continue
        names = sorted(rounds[0]["wall_s"], key=_place)
        profiles = {
            row["contestant"]: {key: mean(values) for key, values in row.items() if isinstance(values, list)}
            for row in own
            if row["kind"] == "profile"
        }
        races.append(
            RaceResult(
                label=race["race"],
                strategy=race["strategy"],
                num_ranks=race["num_ranks"],
                modes=race["modes"],
                tokens_per_step=race["global_size"] * race["sequence_length"],
                times={name: [max(row["wall_s"][name]) for row in rounds] for name in names},
                loss_differences={r["contestant"]: r["largest_difference"] for r in own if r["kind"] == "losses"},
                profiles=profiles,
            )
        )
    return races


def efficiency(race: RaceResult, name: str, base: RaceResult) -> Ratio:
    """Tokens per second and rank, over those of the plain loop in another race, on the fewest ranks.

    On one rank the plain loop has no strategy: no copy, no bucket, no collective. All rows are divided by the same
    figure, so a strategy that wastes time on one rank as well gains nothing by it.

    Args:
        race: where the contestant was measured.
        name: the contestant.
        base: the race of the same mode on the fewest ranks.
    """
    work = race.tokens_per_step / race.num_ranks / (base.tokens_per_step / base.num_ranks)
    ratio = ratio_of_independent(Series(base.times[REFERENCE]), Series(race.times[name]))
    return Ratio(ratio.value * work, ratio.low * work, ratio.high * work)


def series(rows: Sequence[Row]) -> tuple[dict[str, Series], dict[str, Series]]:
    """What a repeated result is compared by: tokens per second, and step times over the plain loop's."""
    rates, ratios = {}, {}
    for race in read_races(rows):
        for name, times in race.times.items():
            row = f"{race.label} {name}"
            rates[row] = Series([race.tokens_per_step / time for time in times])
            if name != REFERENCE:
                ratios[row] = Series(times, race.times.get(REFERENCE))
    return rates, ratios


def markdown(rows: Sequence[Row], file: str, changes: Sequence[str] = ()) -> str:
    """The result as Markdown.

    Args:
        rows: what the raw file holds.
        file: name of the raw file.
        changes: lines that say what has changed since the last result.
    """
    header = rows[0]
    races = read_races(rows)
    lines = [*facts(header, "Scaling over ranks"), "", *_describe(header, races), ""]
    for mode in MODES:
        if any(mode in race.modes for race in races):
            lines += [f"## {mode.capitalize()} scaling", "", *_mode(races, mode, header)]
    lines += ["## Targets", "", *(f"- {line}" for line in _targets(races)), ""]
    lines += ["## Where the time goes", "", *_profiles(races, header), ""]
    if changes:
        lines += ["## Since the last result", "", *changes, ""]
    return "\n".join([*lines, f"Raw times: `{file}`."]) + "\n"


def plot(rows: Sequence[Row]) -> str:
    """Efficiency over ranks as SVG: a row of panels for each mode, a column for each strategy."""
    races = read_races(rows)
    # One rank has no strategy, and is the first point of each; where there is nothing else, it is all.
    strategies = list(dict.fromkeys(race.strategy for race in races if race.strategy != "none")) or ["none"]
    panels = []
    for mode in (mode for mode in MODES if any(mode in race.modes for race in races)):
        base = _base(races, mode)
        for strategy in strategies:
            lines: dict[str, list[Point]] = {}
            limit: list[tuple[float, float]] = []
            for race in (race for race in races if mode in race.modes and race.strategy in (strategy, "none")):
                limit.append((race.num_ranks, _most_possible(race, rows[0])))
                for name in race.times:
                    found = efficiency(race, name, base)
                    lines.setdefault(name, []).append(Point(race.num_ranks, found.value, found.low, found.high))
            panels.append(Panel(f"{mode}, {strategy}", lines, limit))
    return line_panels(panels, len(strategies), "ranks", "efficiency")


def _describe(header: Row, races: Sequence[RaceResult]) -> Iterator[str]:
    config = header["config"]
    model = config["model"]
    num_pairs = {len(times) for race in races for times in race.times.values()}
    counts = {race.num_ranks for race in races}
    is_whole = num_pairs == {header["num_pairs"]} and counts == set(header["counts"])
    planned = "" if is_whole else f" of {header['num_pairs']} planned: interrupted"
    found = "0" if not num_pairs else str(min(num_pairs))
    yield (
        f"{found} pairs{planned} of each contestant in each race, after {header['num_warmup']} rounds of warm-up, "
        f"{header['steps_per_turn']} steps a turn; {', '.join(map(str, header['counts']))} ranks of "
        f"{header['threads']} threads. {model['architecture']} {header['size']}; micro-batches of "
        f"{config['batch']['micro_size']} sequences of {config['data']['sequence_length']} tokens, precision "
        f"{config['precision']['compute']}. Configurations and settings of all are in the raw file."
    )
    crowded = [count for count in header["counts"] if _most_possible_of(count, header) < 1]
    if crowded:
        cores = header["hardware"]["usable_cores"]
        most = ", ".join(f"{_most_possible_of(count, header):.0%} on {count}" for count in crowded)
        yield ""
        yield (
            f"**More ranks than cores**: {' and '.join(map(str, crowded))} ranks of {header['threads']} threads share "
            f"{cores} cores, so that the most efficiency that is possible is {most}."
        )


def _mode(races: Sequence[RaceResult], mode: str, header: Row) -> list[str]:
    base = _base(races, mode)
    headings = (
        *("ranks", "contestant", "sequences", "step, ms", "tokens/s", "per rank", "efficiency", "95 % interval"),
        *("ratio to plain", "95 % interval", "exposed communication", "loss differs by"),
    )
    lines = []
    for strategy in dict.fromkeys(race.strategy for race in races if mode in race.modes):
        lines += [f"### {strategy}" if strategy != "none" else "### one rank", ""]
        lines += [_row(headings), _row(["---"] * len(headings))]
        for race in races:
            if mode in race.modes and race.strategy == strategy:
                lines += [_row(_cells(race, name, base, header)) for name in race.times]
        lines.append("")
    return lines


def _cells(race: RaceResult, name: str, base: RaceResult, header: Row) -> Sequence[str]:
    ratio, share = race.ratio(name), race.profiles.get(name, {}).get("communication")
    found, difference = efficiency(race, name, base), race.loss_differences.get(name)
    crowded = f" on {header['hardware']['usable_cores']} cores" if _most_possible(race, header) < 1 else ""
    length = header["config"]["data"]["sequence_length"]
    return (
        f"{race.num_ranks}{crowded}",
        name,
        str(race.tokens_per_step // length),
        f"{median(race.times[name]) * 1e3:.1f}",
        f"{race.tokens_per_s(name):,.0f}",
        f"{race.tokens_per_s(name) / race.num_ranks:,.0f}",
        f"{found.value:.1%}",
        f"{found.low:.1%} to {found.high:.1%}",
        "1" if ratio is None else f"{ratio.value:.3f}",
        "" if ratio is None else f"{ratio.low:.3f} to {ratio.high:.3f}",
        "n/a" if share is None else f"{share:.1%}",
        "n/a" if difference is None else f"{difference:.0e}",
    )


def _targets(races: Sequence[RaceResult]) -> Iterator[str]:
    for race in races:
        ours = {name: ratio for name in _OURS if name in race.times and (ratio := race.ratio(name)) is not None}
        if not ours:
            continue
        sentences = []
        for name, ratio in ours.items():
            met = "met" if ratio.high <= TARGET else "missed"
            peers = [peer for peer in race.times if peer not in (REFERENCE, *_OURS)]
            faster = [peer for peer in peers if median(race.times[peer]) <= median(race.times[name])]
            against = f"slower than {', '.join(faster)}" if faster else "faster than every peer" if peers else ""
            sentences.append(f"{name} {met} (upper end {ratio.high:.3f}){f', {against}' if against else ''}")
        yield f"{race.label}, at most {TARGET:.2f} wanted: {'; '.join(sentences)}."


def _profiles(races: Sequence[RaceResult], header: Row) -> Iterator[str]:
    if not any(race.profiles for race in races):
        yield "Not profiled."
        return
    headings = ("race", "contestant", *CATEGORIES, "communication, hidden or not", "profiled step, ms")
    yield f"Shares of {header['num_profiled']} profiled steps, means over ranks; docs/benchmarks.md says what they are."
    yield ""
    yield _row(headings)
    yield _row(["---"] * len(headings))
    for race in races:
        for name in race.times:
            if name in race.profiles:
                found = race.profiles[name]
                shares = [f"{found[category]:.1%}" for category in (*CATEGORIES, "communication_busy")]
                yield _row([race.label, name, *shares, f"{found['step_s'] * 1e3:.1f}"])
    yield ""
    for race in races:
        for name in _OURS:
            if name in race.profiles:
                yield f"- {race.label}: {name} is {verdict(race.profiles[name])}"


def _base(races: Sequence[RaceResult], mode: str) -> RaceResult:
    return min((race for race in races if mode in race.modes), key=lambda race: race.num_ranks)


def _most_possible(race: RaceResult, header: Row) -> float:
    return _most_possible_of(race.num_ranks, header)


def _most_possible_of(num_ranks: int, header: Row) -> float:
    """Efficiency that cores allow: below 1 where ranks have to share them."""
    if header["hardware"]["gpus"]:
        return 1.0
    on_a_node = min(num_ranks, header["ranks_per_node"])
    return min(1.0, header["hardware"]["usable_cores"] / (on_a_node * header["threads"]))


def _place(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
