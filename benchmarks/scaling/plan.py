"""What ``shardline bench scaling`` measures: how many ranks, and which race on them. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measure.overrides import refuse
from benchmarks.measure.same_work import check_same_work
from benchmarks.measure.sizes import Size
from sharding.config import Strategy
from trainer.config import RunConfig, load_config
from trainer.config.rules import World, validate
from trainer.config.short_runs import UNJUDGED, beginning_of_schedule

MODES = ("weak", "strong")
"""Weak scaling: each rank has the same share of a batch that grows. Strong: ranks divide a batch that does not."""

STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3")

FIELDS = ("contest", "settings")
"""Who takes part: everyone, or sharded peers in all of the settings that were tried for them."""

LOG_EVERY_STEPS = 10
"""Steps from one logged loss to the next; losses are compared at the end of the warm-up, transformers a step late."""

# Of each rank.
_WEAK_MICRO_BATCHES = 2
# What a race decides by itself.
_DECIDED = ("parallel.strategy", "parallel.backend", "batch.global_size", "metrics.every_steps")


@dataclass(frozen=True)
class RacePlan:
    """One race.

    Attributes:
        strategy: what all contestants do; ``none`` on one rank, where there is nothing to distribute.
        num_ranks: ranks.
        modes: whose point it is; weak and strong scaling have one in common.
        config: the run that all train, as plain values.
    """

    strategy: Strategy
    num_ranks: int
    modes: list[str]
    config: dict[str, Any]

    @property
    def global_size(self) -> int:
        """Sequences in a step over all ranks."""
        size: int = self.config["batch"]["global_size"]
        return size

    @property
    def label(self) -> str:
        """The race's name in raw rows."""
        return f"{self.strategy} {self.num_ranks}x{self.global_size // self.num_ranks}"


@dataclass(frozen=True)
class ScalingAssignment:
    """What the ranks of one launch are told: one race in one of its starts.

    Attributes:
        race: a RacePlan as plain values.
        start: which start this is, from 0; the races of a start are one experiment.
        rounds: Rounds as plain values.
        field: one of ``FIELDS``.
        contestants: names of those that take part; all if empty.
        threads: CPU threads of each contestant's operators.
        output: JSONL file that rank 0 appends to.
        measures_memory: whether it is no race, but what each contestant holds, one after the other.
    """

    race: dict[str, Any]
    start: int
    rounds: dict[str, int]
    field: str
    contestants: list[str]
    threads: int
    output: str
    measures_memory: bool = False

    @property
    def plan(self) -> RacePlan:
        """The race."""
        return RacePlan(**self.race)


def rank_counts(num_nodes: int, ranks_per_node: int) -> list[int]:
    """Numbers of ranks to measure: doubling up to a node's, then whole nodes doubling up to all."""
    counts = {ranks_per_node, num_nodes * ranks_per_node}
    counts |= {2**power for power in range(ranks_per_node.bit_length()) if 2**power <= ranks_per_node}
    counts |= {2**power * ranks_per_node for power in range(num_nodes.bit_length()) if 2**power <= num_nodes}
    return sorted(counts)


def plan_races(
    size: Size,
    overrides: Sequence[str],
    *,
    counts: Sequence[int],
    modes: Sequence[str],
    strategies: Sequence[Strategy],
    has_gpu: bool,
) -> list[RacePlan]:
    """All races, those on few ranks first.

    A rank's share under weak scaling is two micro-batches. Under strong scaling it is one on the most ranks, and on
    fewer what that makes: the smallest batch that every number of ranks divides. On half as many ranks, both have a
    point in common.

    Args:
        size: model and micro-batch.
        overrides: ``key=value`` changes of the user's.
        counts: numbers of ranks.
        modes: of ``MODES``.
        strategies: of ``STRATEGIES``.
        has_gpu: whether ranks compute on GPUs.

    Raises:
        UserError: an override is the benchmark's own to decide, or does not fit.
    """
    refuse(overrides, _DECIDED, "shardline bench scaling decides this for each race; remove it.")
    schedule = beginning_of_schedule(load_config(size.config, size.overrides), _NUM_STEPS, total_steps=100_000)
    base = load_config(size.config, [*size.overrides, *_FIXED, *schedule, *overrides])
    check_same_work(base)
    races: list[RacePlan] = []
    for num_ranks in sorted(counts):
        sizes: dict[int, list[str]] = {}
        for mode in modes:
            num_micro_batches = _WEAK_MICRO_BATCHES * num_ranks if mode == "weak" else math.lcm(*counts)
            sizes.setdefault(base.batch.micro_size * num_micro_batches, []).append(mode)
        for global_size, its_modes in sizes.items():
            for strategy in ("none",) if num_ranks == 1 else strategies:
                config = _race_config(base, strategy, global_size)
                validate(config, World(num_ranks, has_gpu))
                races.append(RacePlan(strategy, num_ranks, its_modes, config.model_dump(mode="json", by_alias=True)))
    return races


_NUM_STEPS = 1_000_000
_FIXED = (
    "name=scaling",
    f"steps={_NUM_STEPS}",
    "tokens=null",
    "epochs=null",
    f"metrics.every_steps={LOG_EVERY_STEPS}",
    *UNJUDGED,
    # At a rate that trains, rounding grows into other trainings of the same run within some forty steps of so few
    # sequences; at this one every logged step can be compared.
    "optimizer.lr=1e-5",
    "checkpoint.every_steps=0",
    "checkpoint.keep_every=0",
    "tracking.wandb.mode=disabled",
    # Whoever can compile and recompute, can do so in any contestant.
    "compile.enabled=false",
    "activation_checkpointing.mode=none",
    # Who races under the bucketed engine has it set.
    "parallel.backend=torch",
)


def _race_config(base: RunConfig, strategy: Strategy, global_size: int) -> RunConfig:
    parallel = base.parallel.model_copy(update={"strategy": strategy})
    batch = base.batch.model_copy(update={"global_size": global_size})
    return base.model_copy(update={"parallel": parallel, "batch": batch})
