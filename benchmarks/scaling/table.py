"""What ``shardline bench scaling`` has found, from its raw rows: tables, verdicts, a plot."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.contestants.field import ABSENT
from benchmarks.measure.comparison import Series
from benchmarks.measure.starts import RatioOfStarts
from benchmarks.measure.step_profile import CATEGORIES, verdict
from benchmarks.presentation.facts import facts
from benchmarks.presentation.plots import Panel, Point, line_panels
from benchmarks.scaling.plan import MODES
from benchmarks.scaling.races import EXTRA, OURS, RaceResult, base_of, efficiency, read_races
from benchmarks.scaling.targets import targets

Row = Mapping[str, Any]
_MIB = 2**20


def series(rows: Sequence[Row]) -> dict[str, Series]:
    """Tokens per second by row, of all starts."""
    return {
        f"{race.label} {name}": Series([race.tokens_per_step / time for times in race.times[name] for time in times])
        for race in read_races(rows)
        for name in race.contestants
    }


def markdown(rows: Sequence[Row], file: str, changes: Sequence[str] = ()) -> str:
    """The result as Markdown.

    Args:
        rows: what the raw file holds.
        file: name of the raw file.
        changes: lines that say what has changed since the last result.
    """
    header = rows[0]
    races = read_races(rows)
    lines = [*facts(header, "Scaling over ranks"), "", *_describe(header, rows, races), ""]
    for mode in MODES:
        if any(mode in race.modes for race in races):
            lines += [f"## {mode.capitalize()} scaling", "", *_mode(races, mode, header)]
    lines += ["## Targets", "", *targets(races), ""]
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
        base = base_of(races, mode)
        for strategy in strategies:
            lines: dict[str, list[Point]] = {}
            limit: list[tuple[float, float]] = []
            for race in (race for race in races if mode in race.modes and race.strategy in (strategy, "none")):
                limit.append((race.num_ranks, _most_possible(race, rows[0])))
                for name in race.contestants:
                    found = efficiency(race, name, base)
                    if found is not None:
                        lines.setdefault(name, []).append(Point(race.num_ranks, found.value, found.low, found.high))
            panels.append(Panel(f"{mode}, {strategy}", lines, limit))
    return line_panels(panels, len(strategies), "ranks", "efficiency")


def _describe(header: Row, rows: Sequence[Row], races: Sequence[RaceResult]) -> Iterator[str]:
    config = header["config"]
    model = config["model"]
    num_pairs = {len(pairs) for race in races for starts in race.times.values() for pairs in starts}
    missing = _missing(rows)
    planned = f" ({missing} of the starts that were planned are missing: interrupted)" if missing else ""
    yield (
        f"{_span(len(race.starts) for race in races)} starts{planned} of {_span(num_pairs)} pairs of each contestant "
        f"in each race, after {header['num_warmup']} rounds of warm-up, {header['steps_per_turn']} steps a turn; "
        f"{', '.join(map(str, header['counts']))} ranks of {header['threads']} threads. {model['architecture']} "
        f"{header['size']}; micro-batches of {config['batch']['micro_size']} sequences of "
        f"{config['data']['sequence_length']} tokens, precision {config['precision']['compute']}. Configurations and "
        "settings of all are in the raw file."
    )
    yield ""
    yield (
        "A start is new processes and another order of building. A ratio is the geometric mean over starts of the "
        "ratios of medians; its 95 % interval resamples starts, and pairs within them; the spread is the largest "
        "start's ratio over the smallest's. What a contestant holds is bytes of tensors of the rank with most, between "
        "steps and at most in a step, activations among them. In stage 3 the bucketed engine keeps its first block and "
        "what is in no block."
    )
    if any(race.strategy not in ("none", "ddp") for race in races):
        yield ""
        yield f"Not in sharded races: {'; '.join(f'{name}: {reason}' for name, reason in ABSENT.items())}."
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
    base = base_of(races, mode)
    headings = (
        *("ranks", "contestant", "sequences", "step, ms", "tokens/s", "per rank", "efficiency", "95 % interval"),
        *("ratio to plain", "95 % interval", "spread", "exposed communication", "loss differs by", "norm differs by"),
        *("holds, MiB", "at most, MiB"),
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
    crowded = f" on {header['hardware']['usable_cores']} cores" if _most_possible(race, header) < 1 else ""
    length = header["config"]["data"]["sequence_length"]
    first = (f"{race.num_ranks}{crowded}", name, str(race.tokens_per_step // length), f"{race.step_s(name) * 1e3:.1f}")
    ratio = race.ratio(name)
    ratios = (*_ratio_cells(ratio), "" if ratio is None else f"{ratio.spread:.1%}")
    if name == EXTRA:
        return (*first, *([""] * 4), *ratios, *([""] * 5))
    found, share = efficiency(race, name, base), race.profiles.get(name, {}).get("communication")
    loss, norm = race.loss_differences.get(name), race.norm_differences.get(name)
    return (
        *first,
        f"{race.tokens_per_s(name):,.0f}",
        f"{race.tokens_per_s(name) / race.num_ranks:,.0f}",
        "n/a" if found is None else f"{found.value:.1%}",
        "n/a" if found is None else f"{found.low:.1%} to {found.high:.1%}",
        *ratios,
        "n/a" if share is None else f"{share:.1%}",
        "n/a" if loss is None else f"{loss:.0e}",
        "n/a" if norm is None else f"{norm:.0e}",
        *(f"{num_bytes / _MIB:.1f}" for num_bytes in race.memory.get(name, ())),
        *([""] * (0 if name in race.memory else 2)),
    )


def _ratio_cells(ratio: RatioOfStarts | None) -> tuple[str, str]:
    return ("1", "") if ratio is None else (f"{ratio.value:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}")


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
        for name in OURS:
            if name in race.profiles:
                yield f"- {race.label}: {name} is {verdict(race.profiles[name])}"


def _most_possible(race: RaceResult, header: Row) -> float:
    return _most_possible_of(race.num_ranks, header)


def _most_possible_of(num_ranks: int, header: Row) -> float:
    """Efficiency that cores allow: below 1 where ranks have to share them."""
    if header["hardware"]["gpus"]:
        return 1.0
    on_a_node = min(num_ranks, header["ranks_per_node"])
    return min(1.0, header["hardware"]["usable_cores"] / (on_a_node * header["threads"]))


def _missing(rows: Sequence[Row]) -> int:
    """How many starts of races were planned and are not whole."""
    plans = [row for row in rows if row["kind"] == "plan"]
    planned = {(label, start): row["num_pairs"] for row in plans for label in row["races"] for start in row["starts"]}
    found = Counter((row["race"], row["start"]) for row in rows if row["kind"] == "round" and "start" in row)
    return sum(found[race] < num_pairs for race, num_pairs in planned.items())


def _span(numbers: Iterable[int]) -> str:
    """One number, or the least and the most of them."""
    found = sorted(set(numbers)) or [0]
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
