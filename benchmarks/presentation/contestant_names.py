"""What pages and plots call contestants."""

NAMES = {
    "plain": "plain PyTorch",
    "plain again": "plain PyTorch again",
    "shardline": "Shardline",
    "shardline run": "`shardline run`",
    "shardline bucketed": "Shardline, `parallel.backend: bucketed`",
    "accelerate": "Accelerate",
    "fabric": "Lightning Fabric",
    "fastapi": "FastAPI loop",
    "litserve": "LitServe",
    "transformers": "transformers Trainer",
    "deepspeed": "DeepSpeed",
    "fully_shard": "`fully_shard`",
    "fully_shard tuned": "`fully_shard`, tuned",
    "fully_shard tuned, equal memory": "`fully_shard`, tuned, with as much memory as bucketed",
    "zero redundancy": "DDP + `ZeroRedundancyOptimizer`",
    "extra collectives": "what the stage sends beyond DDP, alone",
}
"""Contestants in words."""


def in_words(name: str) -> str:
    """A contestant as a page writes it; any other text is left as it is."""
    return NAMES.get(name, name)


def without_markup(name: str) -> str:
    """The same for a plot, which knows no code."""
    return in_words(name).replace("`", "")
