"""What a person asks Slurm for: options of ``shardline slurm submit``, and those of sbatch after ``--``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sharding.ranks.errors import UserError
from trainer.config.rules import World

_GPUS = re.compile(r"(?:(?P<kind>[^:,=\s]+):)?(?P<num>\d+)")
# Options of sbatch that the scripts and the commands build on, and what to write in their place.
_TAKEN = {
    **dict.fromkeys(("--nodes", "-N"), "--nodes before --"),
    **dict.fromkeys(("--ntasks", "-n", "--ntasks-per-node"), "--gpus-per-node or --ntasks-per-node before --"),
    **dict.fromkeys(("--gpus", "-G", "--gpus-per-task"), "--gpus-per-node"),
    **dict.fromkeys(("--cpus-per-task", "-c", "--cpus-per-gpu"), "--cpus-per-rank before --"),
    **dict.fromkeys(("--array", "-a"), "--array before --"),
    **dict.fromkeys(("--output", "-o"), "shardline slurm logs, which knows where the output is"),
    **dict.fromkeys(("--chdir", "-D"), "cd before you submit"),
    "--export": "export NAME=value before you submit: the job has your environment",
    "--wrap": "a script of your own",
}


@dataclass(frozen=True)
class Request:
    """What a job is to have.

    Attributes:
        nodes: nodes.
        gpus_per_node: GPUs of each, with their kind where one was named, as ``4`` or ``h100:4``; 0 for ranks on CPUs,
            None where nothing was said.
        ntasks_per_node: ranks of each node where there are no GPUs.
        cpus_per_rank: CPUs of each rank; None for what nodes have for each.
        launcher: torchrun, deepspeed or srun.
        options: further options of sbatch by name; those without a value are left out.
        further: options of sbatch as they were written after ``--``.
    """

    nodes: int
    gpus_per_node: str | None
    ntasks_per_node: int | None
    cpus_per_rank: int | None
    launcher: str
    options: dict[str, str | None]
    further: tuple[str, ...] = ()

    @property
    def num_gpus(self) -> int:
        """GPUs of each node."""
        return int((self.gpus_per_node or "0").rpartition(":")[2])

    @property
    def ranks_per_node(self) -> int:
        """One per GPU, or as many as asked for."""
        return self.num_gpus or self.ntasks_per_node or 1

    @property
    def world(self) -> World:
        """The ranks of all nodes."""
        return World(self.nodes * self.ranks_per_node, has_gpu=self.num_gpus > 0)

    @property
    def tasks_per_node(self) -> int:
        """What srun starts: ranks, or one agent."""
        return self.ranks_per_node if self.launcher == "srun" or not self.num_gpus else 1


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides, and the options of sbatch that stood after ``--``: a setting never begins with a dash."""
    begin = next((index for index, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    return list(arguments[:begin]), list(arguments[begin:])


def with_further(request: Request, further: Sequence[str]) -> Request:
    """The request with options of sbatch; ``--gpus-per-node`` among them counts as our own.

    Raises:
        UserError: one is ours to set, or GPUs are no number.
    """
    gpus, kept, index = request.gpus_per_node, [], 0
    while index < len(further):
        argument = further[index]
        name, has_value, value = argument.partition("=")
        # -N2 is -N 2.
        short = argument[:2] if re.match(r"-[^-]", argument) else ""
        index += 1
        if name == "--gpus-per-node":
            if not has_value:
                value = further[index] if index < len(further) else ""
                index += 1
            if gpus not in (None, value):
                raise UserError(f"--gpus-per-node {gpus} before -- and {value} after it: write it once.")
            gpus = value
            continue
        following = value if has_value else " ".join(further[index : index + 1])
        remedy = _TAKEN.get(short or name)
        if name == "--gres" and "gpu" in following:
            remedy = "--gpus-per-node"
        if remedy is not None:
            raise UserError(f"{argument} after -- would contradict what submit asks for; use {remedy}.")
        kept.append(argument)
    if gpus is not None and _GPUS.fullmatch(gpus) is None:
        raise UserError(f"--gpus-per-node {gpus} is no number of GPUs; write 4, or h100:4 for a kind of them.")
    return replace(request, gpus_per_node=gpus, further=tuple(kept))
