"""What is wanted of a race and whether it is so, each by an interval over starts."""

from collections.abc import Iterator, Sequence

from benchmarks.contestants.field import BUCKETED, EQUAL_MEMORY, TUNED
from benchmarks.measure.starts import RatioOfStarts
from benchmarks.scaling.races import EXTRA, OURS, REFERENCE, ZERO_REDUNDANCY, RaceResult

TARGET = 1.03
"""Upper end of the interval of what Shardline's step is at most, over the step that it is compared with."""


def targets(races: Sequence[RaceResult]) -> Iterator[str]:
    """One line for each race in which Shardline took part: what is wanted, whether it is met, and who is faster."""
    for race in races:
        for name in OURS:
            if name in race.times and len(race.contestants) > 1:
                sentences = [*_wanted(race, name), *_against(race, name)]
                yield f"{race.label}, {name}: {'; '.join(sentences)}."


def _wanted(race: RaceResult, name: str) -> Iterator[str]:
    if race.strategy in ("none", "ddp"):
        yield from _at_most(race.ratio(name), TARGET, "the plain loop")
    elif name != BUCKETED:
        yield from _at_most(race.ratio(name, "fully_shard"), TARGET, "plain `fully_shard`")
    elif race.strategy == "zero1":
        yield from _at_most(race.ratio(name, ZERO_REDUNDANCY), TARGET, "DDP with ZeroRedundancyOptimizer")
    else:
        sum_ = race.ratio_to_sum(name, (REFERENCE, EXTRA))
        yield from _at_most(sum_, 1.0, "DDP and its extra collectives")
    if race.strategy in ("zero1", "zero2", "zero3") and name == BUCKETED:
        yield from _at_most(race.ratio(name, TUNED), 1.0, "tuned `fully_shard`")
        yield from _at_most(race.ratio(name, EQUAL_MEMORY), 1.0, "tuned `fully_shard` at equal memory")
        yield from _at_most(race.ratio(name, "deepspeed"), 1.0, "DeepSpeed")


def _at_most(ratio: RatioOfStarts | None, limit: float, of: str) -> Iterator[str]:
    if ratio is None:
        return
    interval = f"{ratio.value:.3f}, {ratio.low:.3f} to {ratio.high:.3f}"
    yield f"at most {limit:.2f} of {of} wanted, {'met' if ratio.high <= limit else 'missed'} ({interval})"


def _against(race: RaceResult, name: str) -> Iterator[str]:
    """Who is slower and who is faster; of one start nothing is said."""
    peers = [peer for peer in race.contestants if peer != REFERENCE and peer not in OURS]
    ratios = {peer: ratio for peer in peers if (ratio := race.ratio(name, peer)) is not None}
    if not ratios:
        return
    if len(race.starts) == 1:
        yield "one start alone does not say who is faster"
        return
    faster = [peer for peer, ratio in ratios.items() if ratio.is_below_one]
    slower = [peer for peer, ratio in ratios.items() if ratio.low > 1.0]
    level = [peer for peer in ratios if peer not in (*faster, *slower)]
    for what, found in (("faster than", faster), ("not told apart from", level), ("slower than", slower)):
        if found:
            yield f"{what} {', '.join(f'{peer} ({ratios[peer].value:.3f})' for peer in found)}"
