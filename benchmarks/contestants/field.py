"""The contestants of each strategy by name, in the order in which they are built."""

from functools import partial

from benchmarks.contestants.accelerate_loop import AccelerateLoop
from benchmarks.contestants.contest import BuildContestant
from benchmarks.contestants.deepspeed_loop import DeepSpeedLoop
from benchmarks.contestants.fabric_loop import FabricLoop
from benchmarks.contestants.plain_loop import PlainLoop
from benchmarks.contestants.plain_sharded_loop import PlainShardedLoop
from benchmarks.contestants.shardline_trainer import ShardlineTrainer
from benchmarks.contestants.transformers_trainer import TransformersTrainer
from sharding.config import Strategy
from trainer.config.rules import BACKEND_STRATEGIES

CONTROL = "plain again"
"""A second plain loop: how far its ratio is from 1 is how far any ratio may be from the truth."""

BUCKETED = "shardline bucketed"
"""Shardline with ``parallel.backend=bucketed``."""


def builders_of(strategy: Strategy) -> dict[str, BuildContestant]:
    """Who takes part under a strategy; under ``none``, on one rank, there is nothing to distribute and so no peer."""
    if strategy == "none":
        return {"plain": PlainLoop, "shardline": ShardlineTrainer}
    if strategy == "ddp":
        # The arguments of transformers' Trainer reset state that Accelerate shares within a process, so it comes first.
        return {
            "transformers": TransformersTrainer,
            "plain": PlainLoop,
            "shardline": ShardlineTrainer,
            "accelerate": AccelerateLoop,
            "fabric": FabricLoop,
        }
    builders: dict[str, BuildContestant] = {
        "plain": partial(PlainShardedLoop, strategy=strategy),
        "shardline": ShardlineTrainer,
    }
    if strategy in BACKEND_STRATEGIES["bucketed"]:
        builders[BUCKETED] = partial(ShardlineTrainer, backend="bucketed")
    return builders | {"deepspeed": partial(DeepSpeedLoop, strategy=strategy)}
