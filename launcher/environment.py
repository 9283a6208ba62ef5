"""The one table of environment variables that ranks are started with; a user's own value always wins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.import_path import import_variables
from launcher.topology import Topology
from trainer.config import RunConfig
from trainer.runtime.threads import threads_per_rank


@dataclass(frozen=True)
class Variable:
    """A variable, its value, and the reason for it.

    Attributes:
        name: the variable.
        value: what Shardline sets it to.
        why: the reason, for ``--dry-run``.
        other_names: names under which libraries read the same setting; a user may have used one of them.
        is_configured: whether the value is the user's own, from the configuration.
    """

    name: str
    value: str
    why: str
    other_names: tuple[str, ...] = ()
    is_configured: bool = False


def rank_variables(
    config: RunConfig, topology: Topology, num_ranks: int, environment: Mapping[str, str], num_nodes: int = 1
) -> list[Variable]:
    """What Shardline sets for ranks on this machine.

    Args:
        config: the run.
        topology: this machine.
        num_ranks: ranks on this machine.
        environment: what the user has set.
        num_nodes: machines of the run; ranks of several reach one another over the network that the libraries find.
    """
    threads = threads_per_rank(config, num_ranks, environment)
    only_ours = "code comes from Shardline and from what is installed, never from the working folder"
    imports = import_variables(environment).items()
    variables = [
        *(Variable(name, value, only_ours, is_configured=True) for name, value in imports),
        Variable(
            "OMP_NUM_THREADS",
            str(threads),
            "usable cores / ranks, or launch.threads_per_rank; the launchers' own default of 1 leaves cores idle",
            is_configured=config.launch.threads_per_rank > 0,
        ),
        Variable("TOKENIZERS_PARALLELISM", "false", "ranks only decode; threads before a fork would warn"),
        Variable(
            "TORCH_FR_BUFFER_SIZE",
            "2000",
            "keeps the latest collectives, of gloo too, for the report of a hang (torch's default, stated)",
            other_names=("TORCH_NCCL_TRACE_BUFFER_SIZE",),
        ),
        Variable("PYTHONFAULTHANDLER", "1", "a crash in native code leaves the Python line it came from in the log"),
    ]
    if topology.num_gpus:
        variables += [
            Variable(
                "PYTORCH_ALLOC_CONF",
                "expandable_segments:True",
                "less fragmentation of GPU memory, so larger batches fit",
                other_names=("PYTORCH_CUDA_ALLOC_CONF",),
            ),
            Variable(
                "TORCH_NCCL_ASYNC_ERROR_HANDLING",
                "3",
                "a failed or late collective ends the rank, without a clean-up that may hang (torch's default, stated)",
                other_names=("NCCL_ASYNC_ERROR_HANDLING",),
            ),
            Variable("NCCL_DEBUG", "WARN", "NCCL's own reason for a failure is in the log"),
        ]
    if num_nodes == 1:
        why = "ranks of one machine need no other interface, and nobody else reaches them"
        variables.append(Variable("GLOO_SOCKET_IFNAME", "lo", why))
        if topology.num_gpus:
            why = "as for gloo; data goes over NVLink, PCIe or shared memory"
            variables.append(Variable("NCCL_SOCKET_IFNAME", "lo", why))
    return variables


def launcher_variables(launcher: str, topology: Topology, num_ranks: int) -> list[Variable]:
    """What a launcher needs beyond that.

    Args:
        launcher: torchrun, deepspeed or accelerate.
        topology: this machine.
        num_ranks: ranks on this machine.
    """
    if launcher == "deepspeed" and not topology.num_gpus:
        return [Variable("DS_ACCELERATOR", "cpu", "DeepSpeed need not guess, and warns of no missing GPU")]
    if launcher == "accelerate" and num_ranks == 1:
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        why = "accelerate launch leaves a single process without a place; the other launchers give it one"
        return [Variable(name, value, why) for name, value in place.items()]
    return []


def applied(variables: Sequence[Variable], environment: Mapping[str, str]) -> tuple[list[Variable], list[str]]:
    """The variables to add, and a sentence for each where the user's own value stays.

    Args:
        variables: the table.
        environment: what the user has set.
    """
    added, kept = [], []
    for variable in variables:
        own = next((name for name in (variable.name, *variable.other_names) if name in environment), None)
        if own is None or (variable.is_configured and environment[own] != variable.value):
            added.append(variable)
        elif environment[own] != variable.value:
            kept.append(
                f"{own}={environment[own]} is kept from your environment "
                f"(Shardline would set {variable.name}={variable.value})"
            )
    return added, kept
