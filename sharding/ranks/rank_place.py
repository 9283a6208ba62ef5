"""A rank's place as its launcher says it: torchrun, DeepSpeed, Accelerate, srun, mpirun, each in its own variables.

Imports no torch.
"""

from collections.abc import Mapping

from sharding.ranks.errors import UserError
from sharding.ranks.process_lifetime import ACCELERATE_VARIABLE
from sharding.ranks.slurm_step import num_step_tasks, step_place

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# DeepSpeed's launcher calls LOCAL_WORLD_SIZE so.
_DEEPSPEED_LOCAL_WORLD_SIZE = "LOCAL_SIZE"
_OPENMPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}
# What torchrun takes on one machine.
_DEFAULT_ADDRESS, _DEFAULT_PORT = "127.0.0.1", "29500"


def place_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables in torch's names that a rank of srun or mpirun lacks; empty under launchers that set them.

    Raises:
        UserError: only some are set, or two launchers contradict one another.
    """
    if any(name in environment for name in _VARIABLES):
        _check_against_step(environment)
        return {}
    if any(name in environment for name in _OPENMPI.values()):
        return _openmpi_place(environment)
    if "SLURM_STEP_ID" in environment and ACCELERATE_VARIABLE not in environment:
        place = step_place(environment)
        # One task needs no rendezvous, so nothing is to go wrong about one.
        return {} if place["WORLD_SIZE"] == "1" else place
    return {}


def read_ranks(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as a launcher set them; one rank by itself where none is set.

    torchrun, and ``accelerate launch`` of several processes, set all four. DeepSpeed's launcher says LOCAL_SIZE for the
    last. ``accelerate launch`` of one process sets none. srun and mpirun: see ``place_variables``.

    Raises:
        UserError: only some are set, or they contradict one another, or the launcher started less than it was asked to.
    """
    environment = _with_one_name_for_the_local_size({**environment, **place_variables(environment)})
    missing = [name for name in _VARIABLES if name not in environment]
    if len(missing) == len(_VARIABLES):
        if ACCELERATE_VARIABLE in environment and "MASTER_ADDR" in environment:
            raise UserError(
                "accelerate launch was asked for several processes and started one, as it does on a CPU; "
                "add --multi_gpu, which starts them there too, or ask for --num_processes 1."
            )
        return 0, 1, 0, 1
    if missing:
        present = ", ".join(f"{name}={environment[name]}" for name in _VARIABLES if name in environment)
        raise UserError(
            f"{present} is set, but {', '.join(missing)} is not; start ranks with a launcher, or unset all."
        )
    try:
        rank, world_size, local_rank, local_world_size = (int(environment[name]) for name in _VARIABLES)
    except ValueError:
        values = ", ".join(f"{name}={environment[name]}" for name in _VARIABLES)
        raise UserError(f"{values}: not all of these are numbers; start ranks with a launcher.") from None
    for name, value, limit_name, limit in (
        ("RANK", rank, "WORLD_SIZE", world_size),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world_size),
        ("LOCAL_WORLD_SIZE", local_world_size, "WORLD_SIZE", world_size + 1),
    ):
        if not 0 <= value < limit:
            raise UserError(f"{name}={value} does not fit {limit_name}={environment[limit_name]}; check the launcher.")
    return rank, world_size, local_rank, local_world_size


def has_one_gpu_per_task(environment: Mapping[str, str]) -> bool:
    """Whether srun started this rank with no launcher in between, so that Slurm may show it just its own GPU."""
    by_launcher = "TORCHELASTIC_RUN_ID" in environment or _DEEPSPEED_LOCAL_WORLD_SIZE in environment
    return "SLURM_PROCID" in environment and not by_launcher


def note_on_place(environment: Mapping[str, str]) -> str:
    """A sentence where this process trains alone although its Slurm job has several tasks; empty otherwise."""
    num_tasks = environment.get("SLURM_NTASKS", "1")
    if num_tasks == "1" or "SLURM_JOB_ID" not in environment or num_step_tasks(environment):
        return ""
    if read_ranks(environment)[1] > 1:
        return ""
    return f"SLURM_NTASKS={num_tasks}, but srun did not start this process: it trains alone, as one rank."


def _check_against_step(environment: Mapping[str, str]) -> None:
    """A step of several tasks has either one rank a task, or one launcher's agent a task."""
    num_tasks = num_step_tasks(environment)
    if num_tasks < 2:
        return
    if "TORCHELASTIC_RUN_ID" in environment:
        num_agents = environment.get("GROUP_WORLD_SIZE", "")
        if num_agents.isdigit() and int(num_agents) < num_tasks:
            raise UserError(
                f"srun started {num_tasks} tasks, but torchrun knows of GROUP_WORLD_SIZE={num_agents}, so that there "
                "would be several worlds; start one torchrun a node: srun --ntasks=$SLURM_NNODES --ntasks-per-node=1."
            )
        return
    if _DEEPSPEED_LOCAL_WORLD_SIZE in environment or ACCELERATE_VARIABLE in environment:
        return
    theirs = {name: environment.get(name) for name in ("RANK", "WORLD_SIZE")}
    slurms = {"RANK": environment.get("SLURM_PROCID"), "WORLD_SIZE": str(num_tasks)}
    if None not in theirs.values() and theirs != slurms:
        raise UserError(
            f"RANK={theirs['RANK']} and WORLD_SIZE={theirs['WORLD_SIZE']} contradict srun's SLURM_PROCID="
            f"{slurms['RANK']} and SLURM_STEP_NUM_TASKS={num_tasks}; unset RANK, WORLD_SIZE, LOCAL_RANK and "
            "LOCAL_WORLD_SIZE, or set them in each task."
        )


def _openmpi_place(environment: Mapping[str, str]) -> dict[str, str]:
    missing = [name for name in _OPENMPI.values() if name not in environment]
    if missing:
        present = ", ".join(f"{name}={environment[name]}" for name in _OPENMPI.values() if name in environment)
        raise UserError(f"{present} is set, but {', '.join(missing)} is not; start ranks with mpirun, or unset all.")
    place = {name: environment[openmpi] for name, openmpi in _OPENMPI.items()}
    for name, default in (("MASTER_ADDR", _DEFAULT_ADDRESS), ("MASTER_PORT", _DEFAULT_PORT)):
        if name not in environment:
            if place["WORLD_SIZE"] != place["LOCAL_WORLD_SIZE"]:
                raise UserError(
                    f"mpirun started ranks on several nodes, but {name} is not set; hand it to all of them with "
                    f"mpirun -x MASTER_ADDR=<rank 0's node> -x MASTER_PORT={_DEFAULT_PORT}."
                )
            place[name] = default
    return place


def _with_one_name_for_the_local_size(environment: Mapping[str, str]) -> Mapping[str, str]:
    if "RANK" not in environment or _DEEPSPEED_LOCAL_WORLD_SIZE not in environment:
        return environment
    local_size = environment[_DEEPSPEED_LOCAL_WORLD_SIZE]
    other = environment.get("LOCAL_WORLD_SIZE", local_size)
    if other != local_size:
        raise UserError(
            f"LOCAL_WORLD_SIZE={other} does not fit {_DEEPSPEED_LOCAL_WORLD_SIZE}={local_size}; "
            "one launcher was started inside another: unset what the outer one has set."
        )
    return {**environment, "LOCAL_WORLD_SIZE": local_size}
