"""The contestants of each strategy by name, and who cannot take part."""

from functools import partial

from benchmarks.contestants.accelerate_loop import AccelerateLoop
from benchmarks.contestants.contest import BuildContestant
from benchmarks.contestants.deepspeed_loop import DeepSpeedLoop, tunings
from benchmarks.contestants.equal_memory_loop import EqualMemoryLoop
from benchmarks.contestants.extra_collectives import ExtraCollectives
from benchmarks.contestants.fabric_loop import FabricLoop, FabricShardedLoop
from benchmarks.contestants.plain_loop import PlainLoop
from benchmarks.contestants.plain_sharded_loop import PlainShardedLoop, TunedShardedLoop
from benchmarks.contestants.race import REFERENCE
from benchmarks.contestants.shardline_trainer import ShardlineTrainer
from benchmarks.contestants.transformers_trainer import TransformersTrainer
from benchmarks.contestants.zero_redundancy_loop import ZeroRedundancyLoop
from sharding.config import Strategy
from trainer.config.rules import BACKEND_STRATEGIES

CONTROL = "plain again"
"""A second plain loop: how far its ratio is from 1 is how far any ratio may be from the truth."""

BUCKETED = "shardline bucketed"
"""Shardline with ``parallel.backend=bucketed``."""

TUNED = "fully_shard tuned"
"""``fully_shard`` with all that its public API has for speed."""

EQUAL_MEMORY = "fully_shard tuned, equal memory"
"""The same, which also keeps what the bucketed engine keeps in stage 3."""

ABSENT: dict[str, str] = {
    "accelerate": "on a CPU it trains DDP in silence where FSDP or DeepSpeed is asked for",
    "transformers": "its Trainer shards by Accelerate",
    "fabric's FSDPStrategy": "it wants a GPU; its ModelParallelStrategy with fully_shard takes part",
    "ZeroRedundancyOptimizer with overlap_with_ddp": "it steps before the norm of all gradients is known",
}
"""Who takes no part in sharded races on a CPU, and why."""


def builders_of(strategy: Strategy) -> dict[str, BuildContestant]:
    """Who takes part under a strategy; under ``none``, on one rank, there is nothing to distribute and so no peer.

    The plain loop under DDP takes part in every race: sharding has to be worth what it takes longer.
    """
    if strategy == "none":
        return {REFERENCE: PlainLoop, "shardline": ShardlineTrainer}
    if strategy == "ddp":
        return {
            REFERENCE: PlainLoop,
            CONTROL: PlainLoop,
            "shardline": ShardlineTrainer,
            "accelerate": AccelerateLoop,
            "fabric": FabricLoop,
            "transformers": TransformersTrainer,
        }
    builders: dict[str, BuildContestant] = {REFERENCE: PlainLoop, "shardline": ShardlineTrainer}
    if strategy in BACKEND_STRATEGIES["bucketed"]:
        builders[BUCKETED] = partial(ShardlineTrainer, backend="bucketed")
    builders["fully_shard"] = partial(PlainShardedLoop, strategy=strategy)
    builders[TUNED] = partial(TunedShardedLoop, strategy=strategy)
    if strategy == "zero3":
        builders[EQUAL_MEMORY] = partial(EqualMemoryLoop, strategy=strategy)
    if strategy == "zero1":
        builders[ZeroRedundancyLoop.name] = ZeroRedundancyLoop
    else:
        builders[ExtraCollectives.name] = partial(ExtraCollectives, strategy=strategy)
    builders["fabric"] = partial(FabricShardedLoop, strategy=strategy)
    return builders | {"deepspeed": partial(DeepSpeedLoop, strategy=strategy)}


def settings_of(strategy: Strategy) -> dict[str, BuildContestant]:
    """Peers of a sharded strategy in the settings that were tried, of which the fastest takes part."""
    builders: dict[str, BuildContestant] = {REFERENCE: PlainLoop}
    if strategy == "zero1":
        for views in (True, False):
            label = f"{ZeroRedundancyLoop.name}, parameters {'as views' if views else 'copied'}"
            builders[label] = partial(ZeroRedundancyLoop, parameters_as_bucket_view=views)
    tried = tunings(strategy)
    return builders | {one.label: partial(DeepSpeedLoop, strategy=strategy, tuning=one) for one in tried}
