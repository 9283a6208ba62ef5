"""This process's place in a Slurm step, and what its ranks can agree on without talking: address and port.

Imports no torch. Only a step, which srun makes, has ranks: a batch script and the shell of ``salloc`` see some of the
same variables (SLURM_PROCID=0, SLURM_NTASKS of the job) and are one process each.
"""

import re
from collections.abc import Mapping

from sharding.ranks.errors import UserError

# Below the range from which kernels take ports for outgoing connections.
_FIRST_PORT, _NUM_PORTS = 12_000, 20_000
_REQUIRED = (
    "SLURM_JOB_ID",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
)


def num_step_tasks(environment: Mapping[str, str]) -> int:
    """How many tasks the step has that this process belongs to; 0 outside of a step."""
    text = environment.get("SLURM_STEP_NUM_TASKS", "")
    return int(text) if "SLURM_STEP_ID" in environment and text.isdigit() else 0


def step_place(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task of a step.

    The address is the name of the step's first node, where its rank 0 is; the port follows from job and step, so that
    jobs that share a node differ. The user's own MASTER_ADDR and MASTER_PORT go before both.

    Raises:
        UserError: a variable of the step is missing or makes no sense, as after an incomplete copy into a container.
    """
    missing = [name for name in _REQUIRED if name not in environment]
    if missing:
        raise UserError(
            f"SLURM_STEP_ID={environment['SLURM_STEP_ID']} is set, but {', '.join(missing)} is not; let srun hand its "
            "whole environment to the ranks (also into a container), or unset SLURM_STEP_ID."
        )
    rank, local_rank, node, num_tasks, step = (
        _number(environment, name)
        for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID")
    )
    tasks_per_node = expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
    if sum(tasks_per_node) != num_tasks or not node < len(tasks_per_node):
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE={environment['SLURM_STEP_TASKS_PER_NODE']} does not fit SLURM_STEP_NUM_TASKS="
            f"{num_tasks} and SLURM_NODEID={node}; one srun was started inside another: unset what the outer one set."
        )
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_tasks),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(tasks_per_node[node]),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(job_port(_number(environment, "SLURM_JOB_ID"), step)),
    }


def job_port(job_id: int, step_id: int = 0) -> int:
    """A TCP port that each step of each job has for itself, as far as numbers go."""
    return _FIRST_PORT + (job_id * 31 + step_id) % _NUM_PORTS


def first_host(node_list: str) -> str:
    """The first name of a list as Slurm writes it, such as ``gpu[03-05,09]-ib,login1``.

    Raises:
        UserError: it is empty or has an open bracket.
    """
    name = re.match(r"(?:[^\[\],]|\[[^\[\]]+\])+", node_list)
    if name is None or (name.end() < len(node_list) and node_list[name.end()] != ","):
        raise UserError(f"the node list {node_list!r} cannot be read; set MASTER_ADDR to the first node's name.")
    return re.sub(r"\[([^\[\]]+)\]", lambda bracket: re.split(r"[-,]", bracket[1])[0], name[0])


def expand_counts(text: str) -> list[int]:
    """Numbers per node as Slurm writes them: ``2(x3),1`` is 2, 2, 2, 1.

    Raises:
        UserError: it is written otherwise.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"{text!r} is no list of numbers per node as Slurm writes them, such as 2(x3),1.")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isdigit():
        raise UserError(f"{name}={text} is not a number; let srun set it.")
    return int(text)
