"""The contestants by name, in the order in which results show them."""

from benchmarks.contestants.accelerate_loop import AccelerateLoop
from benchmarks.contestants.contest import BuildContestant
from benchmarks.contestants.fabric_loop import FabricLoop
from benchmarks.contestants.plain_loop import PlainLoop
from benchmarks.contestants.shardline_trainer import ShardlineTrainer
from benchmarks.contestants.transformers_trainer import TransformersTrainer

CONTROL = "plain again"
"""A second plain loop: how far its ratio is from 1 is how far any ratio may be from the truth."""

# The arguments of transformers' Trainer reset state that Accelerate shares within a process, so it comes first.
BUILDERS: dict[str, BuildContestant] = {
    "transformers": TransformersTrainer,
    "plain": PlainLoop,
    "shardline": ShardlineTrainer,
    "accelerate": AccelerateLoop,
    "fabric": FabricLoop,
}
