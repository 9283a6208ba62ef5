"""The one table of environment variables that ranks are started with; a user's own value always wins."""

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.topology import Topology
from trainer.config import RunConfig


@dataclass(frozen=True)
class Variable:
    """A variable, its value, and the reason for it."""

    name: str
    value: str
    why: str


def rank_variables(config: RunConfig, topology: Topology, num_ranks: int) -> list[Variable]:
    """What Shardline sets for ranks on this machine."""
    threads = config.launch.threads_per_rank or max(1, topology.num_cores // num_ranks)
    variables = [
        Variable("OMP_NUM_THREADS", str(threads), "usable cores / ranks; torchrun's own default of 1 leaves cores idle"),
        Variable("TOKENIZERS_PARALLELISM", "false", "ranks only decode; threads before a fork would warn"),
    ]
    if topology.num_gpus:
        variables += [
            Variable("PYTORCH_ALLOC_CONF", "expandable_segments:True", "less fragmentation, so larger batches fit"),
            Variable("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1", "a failed collective ends the rank instead of hanging it"),
            Variable("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000", "keeps the latest collectives for a report after a hang"),
            Variable("NCCL_DEBUG", "WARN", "NCCL's own reason for a failure is in the rank's log"),
        ]
    return variables


def applied(variables: list[Variable], environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The variables to add, and a sentence for each where the user's own value stays.

    Args:
        variables: the table.
        environment: what the user has set.
    """
    added = {v.name: v.value for v in variables if v.name not in environment}
    kept = [
        f"{v.name}={environment[v.name]} is kept from your environment (Shardline would set {v.value})"
        for v in variables
        if environment.get(v.name, v.value) != v.value
    ]
    return added, kept
