"""What ``shardline bench scaling`` has measured, from its raw rows: races over starts, ratios, efficiencies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from benchmarks.contestants.field import BUCKETED, CONTROL, EQUAL_MEMORY, TUNED
from benchmarks.measure.starts import RatioOfStarts, ratio_over_starts

REFERENCE = "plain"
"""The plain loop, under DDP where there are several ranks: ratios and efficiencies are of its time."""

EXTRA = "extra collectives"
"""What a stage sends beyond DDP, alone; no contestant."""

ZERO_REDUNDANCY = "zero redundancy"
OURS = ("shardline", BUCKETED)

_ORDER = (
    *(REFERENCE, CONTROL, *OURS, EXTRA, ZERO_REDUNDANCY, TUNED, EQUAL_MEMORY, "fully_shard"),
    *("deepspeed", "accelerate", "fabric", "transformers"),
)
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
        starts: numbers of the starts that count.
        times: each contestant's step times in seconds, by start one per round, of the slowest rank.
        loss_differences: from the plain loop, the largest of any start, relative.
        norm_differences: the same of gradient norms.
        profiles: by contestant shares of a profiled step, mean over ranks; see ``StepProfile.shares``.
        memory: by contestant bytes of the rank that holds most, between steps and at most in one.
    """

    label: str
    strategy: str
    num_ranks: int
    modes: Sequence[str]
    tokens_per_step: int
    starts: Sequence[int]
    times: dict[str, list[list[float]]]
    loss_differences: dict[str, float]
    norm_differences: dict[str, float]
    profiles: dict[str, dict[str, float]]
    memory: dict[str, tuple[int, int]]

    @property
    def contestants(self) -> list[str]:
        """Those that train."""
        return [name for name in self.times if name != EXTRA]

    def step_s(self, name: str) -> float:
        """A contestant's step: the median over starts of their medians."""
        return median(median(times) for times in self.times[name])

    def tokens_per_s(self, name: str) -> float:
        """Of one contestant, over all ranks."""
        return self.tokens_per_step / self.step_s(name)

    def ratio(self, name: str, to: str = REFERENCE) -> RatioOfStarts | None:
        """A contestant's step over another's; None for the same one, or where one of them did not take part."""
        if name == to or not {name, to} <= self.times.keys():
            return None
        return ratio_over_starts(self.times[name], self.times[to])

    def ratio_to_sum(self, name: str, parts: Sequence[str]) -> RatioOfStarts | None:
        """A contestant's step over the sum of others' in the same round; None where one of them did not take part."""
        if not {name, *parts} <= self.times.keys():
            return None
        starts = zip(*(self.times[part] for part in parts), strict=True)
        sums = [[sum(round_) for round_ in zip(*start, strict=True)] for start in starts]
        return ratio_over_starts(self.times[name], sums)


def read_races(rows: Sequence[Row]) -> list[RaceResult]:
    """All races that have at least one pair, those on few ranks first.

    A start that was interrupted counts only where no start of its race is whole.
    """
    races: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] == "race":
            races.setdefault(row["race"], []).append(row)
    found = (_read_race(starts, [row for row in rows if row.get("race") == label]) for label, starts in races.items())
    return sorted((race for race in found if race is not None), key=lambda race: race.num_ranks)


def efficiency(race: RaceResult, name: str, base: RaceResult) -> RatioOfStarts | None:
    """Tokens per second and rank, over those of the plain loop in another race, on the fewest ranks.

    On one rank the plain loop has no strategy: no copy, no bucket, no collective. All rows are divided by the same
    figure, so a strategy that wastes time on one rank as well gains nothing by it.

    The two races of a start are one experiment: a start is drawn with both. None where no start has both.

    Args:
        race: where the contestant was measured.
        name: the contestant.
        base: the race of the same mode on the fewest ranks.
    """
    work = race.tokens_per_step / race.num_ranks / (base.tokens_per_step / base.num_ranks)
    both = [start for start in race.starts if start in base.starts]
    if not both:
        return None
    above = [base.times[REFERENCE][base.starts.index(start)] for start in both]
    below = [race.times[name][race.starts.index(start)] for start in both]
    return ratio_over_starts(above, below, in_pairs=race.label == base.label).times(work)


def base_of(races: Sequence[RaceResult], mode: str) -> RaceResult:
    """The race of a mode on the fewest ranks."""
    return min((race for race in races if mode in race.modes), key=lambda race: race.num_ranks)


def _read_race(starts: Sequence[Row], own: Sequence[Row]) -> RaceResult | None:
    rounds: dict[int, list[Row]] = {}
    for row in own:
        if row["kind"] == "round":
            rounds.setdefault(row.get("start", 0), []).append(row)
    whole = [start for start in rounds if len(rounds[start]) >= starts[-1].get("num_pairs", 0)]
    counted = sorted(whole or rounds)
    if not counted:
        return None
    race = starts[-1]
    # Those that took part in every start.
    names = sorted(set.intersection(*(set(rounds[start][0]["wall_s"]) for start in counted)), key=_place)
    works = [row for row in own if row["kind"] == "losses" and row.get("start", 0) in counted]
    profiles: dict[str, list[dict[str, float]]] = {}
    for row in own:
        if row["kind"] == "profile":
            shares = {key: mean(values) for key, values in row.items() if isinstance(values, list)}
            profiles.setdefault(row["contestant"], []).append(shares)
    return RaceResult(
        label=race["race"],
        strategy=race["strategy"],
        num_ranks=race["num_ranks"],
        modes=race["modes"],
        tokens_per_step=race["global_size"] * race["sequence_length"],
        starts=counted,
        times={name: [[max(row["wall_s"][name]) for row in rounds[start]] for start in counted] for name in names},
        loss_differences=_largest(works, "largest_difference"),
        norm_differences=_largest(works, "largest_norm_difference"),
        profiles={name: {key: mean(one[key] for one in many) for key in many[0]} for name, many in profiles.items()},
        memory={r["contestant"]: (r["rest_bytes"], r["peak_bytes"]) for r in own if r["kind"] == "memory"},
    )


def _largest(rows: Sequence[Row], key: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in rows:
        if key in row:
            found[row["contestant"]] = max(row[key], found.get(row["contestant"], 0.0))
    return found


def _place(name: str) -> tuple[int, str]:
    return (_ORDER.index(name), "") if name in _ORDER else (len(_ORDER), name)
