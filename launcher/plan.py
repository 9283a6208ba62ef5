"""What a run would start: ranks, environment, command; derived from the configuration and this machine."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.command import torchrun_command
from launcher.environment import Variable, applied, rank_variables
from launcher.topology import local_topology, ranks_per_node
from sharding.errors import UserError
from trainer.config import RunConfig, load_config
from trainer.validation import World, accumulation_steps, validate


@dataclass(frozen=True)
class Plan:
    """A checked run and how it is started.

    Attributes:
        config_path: the file as the user named it.
        overrides: the user's ``key=value`` arguments.
        config: both, loaded and checked.
        world: the ranks.
        variables: what is added to the environment.
        kept: a sentence for each variable of the user's that stays as it is.
    """

    config_path: str
    overrides: tuple[str, ...]
    config: RunConfig
    world: World
    variables: list[Variable]
    kept: list[str]

    def command(self, port: int) -> list[str]:
        """Argv of torchrun's agent with its rendezvous on a port."""
        return torchrun_command(self.config_path, self.overrides, self.world.num_ranks, port)

    def describe(self) -> str:
        """The plan as ``--dry-run`` prints it."""
        config, num_ranks = self.config, self.world.num_ranks
        steps = accumulation_steps(config, num_ranks)
        tokens, total = config.tokens_per_step, config.num_steps
        free_port = " (port 0 becomes a free one)" if config.launch.master_port == 0 else ""
        device = "GPU, NCCL" if self.world.has_gpu else "CPU, gloo"
        return "\n".join(
            [
                f"run folder    {config.run_dir}",
                f"ranks         {num_ranks} ({device}), strategy {config.parallel.strategy}, "
                f"data-parallel degree {num_ranks}",
                f"batch         {config.batch.global_size} sequences = {config.batch.micro_size} x {steps} "
                f"accumulation steps x {num_ranks} ranks",
                f"tokens        {tokens:,} a step, {tokens * total:,} in {total:,} steps",
                "environment",
                *(f"  {shlex.quote(f'{v.name}={v.value}')}    # {v.why}" for v in self.variables),
                *(f"  # {sentence}" for sentence in self.kept),
                f"command{free_port}",
                f"  {shlex.join(self.command(config.launch.master_port))}",
            ]
        )


def make_plan(config_path: str, overrides: Sequence[str], nproc_per_node: int | None, launcher: str) -> Plan:
    """Load a configuration, look at this machine, and check that they fit.

    Raises:
        UserError: they do not, or something in the configuration is wrong.
    """
    config = load_config(config_path, list(overrides))
    if launcher != "torchrun":
        raise UserError(f"--launcher {launcher} is not there yet; use torchrun.")
    topology = local_topology()
    num_ranks = ranks_per_node(config, topology, nproc_per_node)
    world = World(num_ranks, has_gpu=topology.num_gpus > 0)
    validate(config, world)
    if topology.num_gpus and num_ranks > topology.num_gpus:
        raise UserError(
            f"{num_ranks} ranks were asked for, but this machine has {topology.num_gpus} GPUs; start at most that many."
        )
    variables, kept = applied(rank_variables(config, topology, num_ranks, os.environ), os.environ)
    return Plan(config_path, tuple(overrides), config, world, variables, kept)
