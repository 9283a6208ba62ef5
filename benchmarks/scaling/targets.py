"""What is wanted of a race and whether it is so, and who is faster, each by an interval over starts."""

from collections.abc import Iterator, Sequence

from benchmarks.contestants.field import BUCKETED, EQUAL_MEMORY, TUNED
from benchmarks.scaling.races import EXTRA, OURS, REFERENCE, ZERO_REDUNDANCY, RaceResult

TARGET = 1.03
"""Upper end of the interval of what Shardline's step is at most, over the step that it is compared with."""

_WITH_EXTRA = "plain and the extra collectives together"


def targets(races: Sequence[RaceResult]) -> list[str]:
    """A table of Markdown: what Shardline takes beside each of the others, what is wanted of that, and what came out.

    Who is faster is said where the whole interval lies on one side of 1, and never of one start alone.
    """
    lines = [
        "| race | contestant | beside | ratio | 95 % interval | wanted | target | step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for race in races:
        for name in OURS:
            if name in race.times:
                lines += [f"| {race.label} | {name} | {cells} |" for cells in _beside(race, name)]
    return lines


def _beside(race: RaceResult, name: str) -> Iterator[str]:
    """Cells of everyone whom a contestant is compared with."""
    limits = _limits(race, name)
    ratios = {peer: race.ratio(name, peer) for peer in race.contestants if peer not in OURS}
    ratios[_WITH_EXTRA] = race.ratio_to_sum(name, (REFERENCE, EXTRA)) if _WITH_EXTRA in limits else None
    for peer, ratio in ratios.items():
        if ratio is not None:
            limit = limits.get(peer)
            wanted = ["", ""] if limit is None else [f"{limit:.2f}", "met" if ratio.high <= limit else "missed"]
            interval = f"{ratio.low:.3f} to {ratio.high:.3f}"
            yield " | ".join([peer, f"{ratio.value:.3f}", interval, *wanted, ratio.verdict])


def _limits(race: RaceResult, name: str) -> dict[str, float]:
    """By contestant what is wanted at most of the upper end of an interval."""
    if race.strategy in ("none", "ddp"):
        return {REFERENCE: TARGET}
    if name != BUCKETED:
        return {"fully_shard": TARGET}
    if race.strategy not in ("zero1", "zero2", "zero3"):
        return {}
    own = {ZERO_REDUNDANCY: TARGET} if race.strategy == "zero1" else {_WITH_EXTRA: 1.0}
    return own | {TUNED: 1.0, EQUAL_MEMORY: 1.0, "deepspeed": 1.0}
