"""What ``shardline tune`` tries, in which order, and what it makes of the results; pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from benchmarks.measure.comparison import Series, ratio_of_independent
from sharding.config import Backend, Strategy
from trainer.config.rules import BACKEND_STRATEGIES
from trainer.metrics.paired_times import Ratio, ratio_of_medians

LESS_THAN_BEST = 0.97
"""Larger micro-batches are given up once two in a row stay below this share of the layout's best rate."""

_GIB = 2**30


@dataclass(frozen=True)
class Candidate:
    """One way to take the same training steps.

    Attributes:
        micro_size: sequences of one rank in a micro-batch; ``batch.global_size`` stays what it is.
        strategy: data-parallel method.
        backend: ``torch`` or ``bucketed``.
        checkpointing: ``activation_checkpointing.mode``.
        compiles: whether blocks are compiled.
    """

    micro_size: int
    strategy: Strategy
    backend: Backend = "torch"
    checkpointing: str = "none"
    compiles: bool = False

    @property
    def overrides(self) -> list[str]:
        """Settings that make a run so."""
        return [
            f"batch.micro_size={self.micro_size}",
            f"parallel.strategy={self.strategy}",
            f"parallel.backend={self.backend}",
            f"activation_checkpointing.mode={self.checkpointing}",
            f"compile.enabled={str(self.compiles).lower()}",
        ]

    @property
    def layout(self) -> str:
        """Strategy and backend, for people."""
        return f"{self.strategy} bucketed" if self.backend == "bucketed" else self.strategy

    @property
    def label(self) -> str:
        """For people, and as a name."""
        parts = [self.layout, f"micro {self.micro_size}"]
        parts += [f"checkpointing {self.checkpointing}"] if self.checkpointing != "none" else []
        return ", ".join([*parts, *(["compiled"] if self.compiles else [])])


@dataclass(frozen=True)
class Trial:
    """A candidate and what became of it.

    Attributes:
        candidate: what was tried.
        estimated_bytes: a rank's memory by the formula, without what kernels need for a moment.
        rates: tokens/s of all ranks in each measured window; empty where it was not measured.
        peak_bytes: of the rank with the most; None where it was not measured.
        reason: why it was not.
    """

    candidate: Candidate
    estimated_bytes: float
    rates: tuple[float, ...] = ()
    peak_bytes: int | None = None
    reason: str = ""

    @property
    def tokens_per_s(self) -> float | None:
        """Of all ranks, median; None where it was not measured."""
        return median(self.rates) if self.rates else None

    @property
    def interval(self) -> Ratio | None:
        """The median with its 95 % interval; None where one window or none was measured: it says nothing of noise."""
        return ratio_of_medians(self.rates, [1.0] * len(self.rates)) if len(self.rates) > 1 else None


def micro_sizes(global_size: int, num_ranks: int) -> list[int]:
    """Micro-batch sizes that divide a rank's share of the global batch, ascending."""
    share = global_size // num_ranks
    return [size for size in range(1, share + 1) if share % size == 0]


def layouts(num_ranks: int, strategies: Sequence[Strategy]) -> list[Candidate]:
    """Each strategy under each backend that has it, at micro-batches of one sequence.

    Args:
        num_ranks: data-parallel ranks; one rank has nothing to divide.
        strategies: what to try on several.
    """
    if num_ranks == 1:
        return [Candidate(1, "none")]
    found = []
    for strategy in strategies:
        found.append(Candidate(1, strategy))
        if strategy in BACKEND_STRATEGIES["bucketed"]:
            found.append(Candidate(1, strategy, backend="bucketed"))
    return found


def gives_up(rates: Sequence[float]) -> bool:
    """Whether larger micro-batches cannot be expected to be faster, from the rates of smaller ones, ascending."""
    if len(rates) < 3:
        return False
    best = max(rates)
    return all(rate < LESS_THAN_BEST * best for rate in rates[-2:])


def refinements(trials: Sequence[Trial], *, with_compile: bool, with_recompute: bool = True) -> list[Candidate]:
    """What to try once every layout is measured: on the fastest, compiled blocks and recomputed activations.

    Recomputation costs time and gives memory back: it is tried at the fastest micro-batch, for runs that must be
    smaller, and at the next larger one of any layout that did not fit, which may be faster.

    Args:
        trials: all so far.
        with_compile: whether compiling is to be tried.
        with_recompute: whether recomputing is.
    """
    modes = ("selective", "full") if with_recompute else ()
    measured = [trial for trial in trials if trial.tokens_per_s is not None]
    if not measured:
        # Nothing fits as it is.
        smallest = [trial.candidate for trial in trials if trial.candidate.micro_size == 1]
        return [replace(candidate, checkpointing=mode) for candidate in smallest for mode in modes]
    best = max(measured, key=lambda trial: trial.tokens_per_s or 0.0).candidate
    compiled = [replace(best, compiles=True)] if with_compile else []
    recomputed = [replace(best, checkpointing=mode) for mode in modes]
    too_large = {trial.candidate.layout: trial.candidate for trial in reversed(trials) if trial.tokens_per_s is None}
    larger = [replace(c, checkpointing=mode) for c in too_large.values() for mode in modes]
    return list(dict.fromkeys([*compiled, *recomputed, *larger]))


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that no other beats in both speed and memory, fastest first."""
    measured = [trial for trial in trials if trial.tokens_per_s is not None and trial.peak_bytes is not None]
    best: list[Trial] = []
    for trial in sorted(measured, key=lambda t: (-(t.tokens_per_s or 0.0), t.peak_bytes or 0)):
        if not best or (trial.peak_bytes or 0) < (best[-1].peak_bytes or 0):
            best.append(trial)
    return best


def equals(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that cannot be told from the fastest: the 95 % interval of the ratio of their rates has 1 in it."""
    measured = sorted((t for t in trials if len(t.rates) > 1), key=lambda t: -(t.tokens_per_s or 0.0))
    if not measured:
        return []
    fastest, others = measured[0], measured[1:]
    return [t for t in others if ratio_of_independent(Series(t.rates), Series(fastest.rates)).high >= 1.0]


def verdict(trials: Sequence[Trial], left: Sequence[str]) -> str:
    """What to take, in sentences.

    Args:
        trials: all that were made.
        left: what was still to be tried when the search was cut short; empty where it went to its end.
    """
    front = pareto(trials)
    if not front:
        said = "nothing could be measured"
    else:
        scope = "fastest of what was measured" if left else "fastest"
        said = f"{scope}: {' '.join(front[0].candidate.overrides)}"
    same = [trial.candidate.label for trial in equals(trials)]
    if same:
        said += f"\nas fast within the noise of this search: {'; '.join(same)}"
    if left:
        said += f"\ncut short, and any of it may be faster: not tried, or not to the end: {'; '.join(left)}"
    return said


def trial_values(trial: Trial, front: Sequence[Trial]) -> dict[str, Any]:
    """A trial for programs; ``front`` are those that no other beats."""
    return {
        "candidate": trial.candidate.label,
        "overrides": list(trial.candidate.overrides),
        "is_on_front": trial in front,
        "tokens_per_s": trial.tokens_per_s,
        "tokens_per_s_interval": None if trial.interval is None else [trial.interval.low, trial.interval.high],
        "peak_bytes": trial.peak_bytes,
        "estimated_bytes": trial.estimated_bytes,
        "reason": trial.reason,
    }


def table_rows(trials: Sequence[Trial]) -> list[tuple[str, ...]]:
    """Cells: a star on the Pareto front, candidate, tokens/s, its interval, peak GiB, estimated GiB, reason."""
    front = pareto(trials)
    measured = sorted((t for t in trials if t.tokens_per_s is not None), key=lambda t: -(t.tokens_per_s or 0.0))
    others = [trial for trial in trials if trial.tokens_per_s is None]
    return [
        (
            "*" if trial in front else "",
            trial.candidate.label,
            "-" if trial.tokens_per_s is None else f"{trial.tokens_per_s:,.0f}",
            "-" if trial.interval is None else f"{trial.interval.low:,.0f} to {trial.interval.high:,.0f}",
            "-" if trial.peak_bytes is None else f"{trial.peak_bytes / _GIB:.2f}",
            f"{trial.estimated_bytes / _GIB:.2f}",
            trial.reason,
        )
        for trial in [*measured, *others]
    ]
