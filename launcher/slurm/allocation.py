"""What a Slurm job was given, and how many ranks that makes; node and GPU counts come from here and nowhere else."""

from collections.abc import Mapping
from dataclasses import dataclass

from sharding.ranks.errors import UserError
from sharding.ranks.slurm_step import expand_counts
from trainer.config import RunConfig

RANKS_VARIABLE = "SHARDLINE_RANKS_PER_NODE"
TASKS_VARIABLE = "SHARDLINE_TASKS_PER_NODE"


@dataclass(frozen=True)
class Allocation:
    """A job's nodes, as it was given them.

    Attributes:
        job_id: the job's number.
        num_nodes: nodes.
        gpus_per_node: GPUs of each node; 0 where none were asked for.
        tasks_per_node: tasks of each node.
    """

    job_id: int
    num_nodes: int
    gpus_per_node: int
    tasks_per_node: int


def read_allocation(environment: Mapping[str, str]) -> Allocation:
    """The job that this process belongs to.

    Args:
        environment: that of a step; SHARDLINE_TASKS_PER_NODE is the job's own number, which srun hides.

    Raises:
        UserError: there is no job, or its nodes differ.
    """
    names = ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", TASKS_VARIABLE)
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise UserError(f"{' and '.join(missing)} is not set; submit a script such as slurm/pretrain.sbatch.")
    tasks = expand_counts(environment[TASKS_VARIABLE])
    if len(set(tasks)) > 1:
        raise UserError(
            f"SLURM_TASKS_PER_NODE={environment[TASKS_VARIABLE]}: nodes have different numbers of tasks; ask for "
            "--nodes and --ntasks-per-node instead of --ntasks."
        )
    return Allocation(
        job_id=int(environment["SLURM_JOB_ID"]),
        num_nodes=int(environment["SLURM_JOB_NUM_NODES"]),
        gpus_per_node=int(environment.get("SLURM_GPUS_ON_NODE") or 0),
        tasks_per_node=tasks[0],
    )


def ranks_of(allocation: Allocation, config: RunConfig, one_task_per_rank: bool) -> int:
    """Ranks on each node: one per GPU, or one per task where there are no GPUs.

    Args:
        allocation: the job's.
        config: ``launch.nproc_per_node``, if set, must say the same.
        one_task_per_rank: whether srun starts the ranks itself.

    Raises:
        UserError: GPUs, tasks and configuration do not fit.
    """
    gpus, tasks, nodes = allocation.gpus_per_node, allocation.tasks_per_node, allocation.num_nodes
    ranks = gpus or tasks
    if gpus and tasks != gpus and (one_task_per_rank or tasks != 1):
        raise UserError(
            f"--ntasks-per-node={tasks} x {nodes} nodes = {tasks * nodes} tasks, but --gpus-per-node={gpus} x {nodes} "
            f"nodes = {gpus * nodes} GPUs, and each GPU has one rank; ask for --ntasks-per-node={gpus} or "
            f"--gpus-per-node={tasks}."
        )
    configured = config.launch.nproc_per_node
    if configured and configured != ranks:
        what = f"{gpus} GPUs" if gpus else f"{tasks} tasks"
        raise UserError(
            f"launch.nproc_per_node={configured} x {nodes} nodes = {configured * nodes} ranks, but the job has {what} "
            f"on each = {ranks * nodes} ranks; remove launch.nproc_per_node, or ask Slurm for {configured} a node."
        )
    return ranks
