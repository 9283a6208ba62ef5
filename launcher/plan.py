"""What a run would start: ranks, environment, command; derived from the configuration and this machine."""

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.command import find_launcher, rank_devices
from launcher.environment import Variable, applied, launcher_variables, rank_variables
from launcher.topology import local_topology, ranks_per_node
from sharding.parallel_dims import ParallelDims, parallel_dims
from sharding.ranks.errors import UserError
from sharding.ranks.slurm_step import num_step_tasks
from trainer.config import RunConfig, load_config
from trainer.config.deepspeed_settings import deepspeed_settings
from trainer.config.rules import World, accumulation_steps, validate
from trainer.config.stages import describe_stage, stages_of, widest_config
from trainer.data.epochs import with_counted_epochs
from trainer.data.prepared import Prepared
from trainer.plan.record import Preview


@dataclass(frozen=True)
class Plan:
    """A checked run and how it is started.

    Attributes:
        config_path: the file as the user named it.
        overrides: the user's ``key=value`` arguments.
        config: both, loaded and checked.
        launcher: what starts the ranks: torchrun, deepspeed or accelerate.
        world: the ranks.
        devices: each rank's GPU, as ``launcher.command.rank_devices`` names it.
        variables: what is added to the environment.
        kept: a sentence for each variable of the user's that stays as it is.
    """

    config_path: str
    overrides: tuple[str, ...]
    config: RunConfig
    launcher: str
    world: World
    devices: list[str]
    variables: list[Variable]
    kept: list[str]

    @property
    def dims(self) -> ParallelDims:
        """The ranks along each axis of parallelism."""
        return parallel_dims(self.config.parallel, self.world.num_ranks)

    def with_counted_epochs(self, corpus: Prepared) -> "Plan":
        """The same with a known number of steps; see ``trainer.data.epochs``."""
        return replace(self, config=with_counted_epochs(self.config, corpus))

    def command(self, port: int, arguments: Sequence[str]) -> list[str]:
        """Argv of the launcher's agent.

        Args:
            port: of the ranks' rendezvous.
            arguments: the configuration that ranks read, and ``key=value`` arguments.
        """
        return find_launcher(self.launcher)(arguments, port, self.devices)

    def values(self, preview: Preview | None) -> dict[str, Any]:
        """The plan for programs.

        Args:
            preview: what is known of model, memory and corpus; None where nobody could look.
        """
        config, dims = self.config, self.dims
        return {
            "run_folder": str(config.run_dir),
            "num_ranks": dims.world_size,
            "has_gpu": self.world.has_gpu,
            "backend": config.parallel.backend,
            "strategy": config.parallel.strategy,
            "data_parallel_degree": dims.data_degree,
            "global_size": config.batch.global_size,
            "micro_size": config.batch.micro_size,
            "accumulation_steps": accumulation_steps(config, dims),
            "unit": config.data.unit,
            "tokens_per_step": config.tokens_per_step,
            "num_steps": config.num_steps if config.is_length_known else None,
            **({} if preview is None else preview.model_dump()),
            "environment": {variable.name: variable.value for variable in self.variables},
            "command": self.command(config.launch.master_port, [self.config_path, *self.overrides]),
        }

    def describe(self, preview: Preview | None) -> str:
        """The plan as ``--dry-run`` prints it.

        Args:
            preview: what is known of model, memory and corpus; None where nobody could look.
        """
        config, dims = self.config, self.dims
        free_port = "; port 0 becomes a free one" if config.launch.master_port == 0 else ""
        device = "GPU, NCCL" if self.world.has_gpu else "CPU, gloo"
        return "\n".join(
            [
                f"run folder    {config.run_dir}",
                f"ranks         {dims.world_size} ({device}), {config.parallel.backend} {config.parallel.strategy}, "
                f"data-parallel degree {dims.data_degree}",
                *self._lengths(),
                *(preview.lines() if preview is not None else []),
                "environment",
                *(f"  {shlex.quote(f'{v.name}={v.value}')}    # {v.why}" for v in self.variables),
                *(f"  # {sentence}" for sentence in self.kept),
                f"command (with the copy that is frozen in the run folder in place of what follows trainer{free_port})",
                f"  {shlex.join(self.command(config.launch.master_port, [self.config_path, *self.overrides]))}",
                *self._deepspeed_lines(),
            ]
        )

    def _lengths(self) -> list[str]:
        """What a step is made of, and how many there are: of the run, or of each stage."""
        lines = []
        for stage in stages_of(self.config):
            config = stage.config
            steps = accumulation_steps(config, self.dims)
            batch = (
                f"{config.batch.global_size} samples = {config.batch.micro_size} x {steps} accumulation steps x "
                f"{self.dims.data_degree} ranks"
            )
            if stage.name:
                line = f"{describe_stage(stage, len(self.config.stages))}; {batch}"
                lines.append(f"{'stages' if stage.index == 0 else '':<14}{line}")
                continue
            tokens = config.tokens_per_step
            length = "how many steps the epochs are is known once the corpus is prepared"
            if config.is_length_known:
                length = f"{tokens * config.num_steps:,} in {config.num_steps:,} steps"
            # A text may be shorter.
            at_most = "at most " if config.data.has_rows and config.data.has_tokens else ""
            lines += [f"batch         {batch}", f"{config.data.unit:<14}{at_most}{tokens:,} a step, {length}"]
        return lines

    def _deepspeed_lines(self) -> list[str]:
        if self.config.parallel.backend != "deepspeed":
            return []
        settings = json.dumps(deepspeed_settings(widest_config(self.config), self.dims), indent=2)
        return ["deepspeed configuration", *(f"  {line}" for line in settings.splitlines())]


def make_plan(config_path: str, overrides: Sequence[str], nproc_per_node: int | None, launcher: str) -> Plan:
    """Load a configuration, look at this machine, and check that they fit.

    Raises:
        UserError: they do not, or something in the configuration is wrong.
    """
    config = load_config(config_path, list(overrides))
    find_launcher(launcher)
    num_tasks = num_step_tasks(os.environ)
    if num_tasks > 1:
        raise UserError(
            f"srun started {num_tasks} tasks, each of which would start a run of its own; start one with srun "
            "--ntasks=1, or ranks on all nodes with sbatch slurm/pretrain.sbatch."
        )
    topology = local_topology()
    num_ranks = ranks_per_node(config, topology, nproc_per_node)
    world = World(num_ranks, has_gpu=topology.num_gpus > 0)
    validate(config, world)
    if topology.num_gpus and num_ranks > topology.num_gpus:
        raise UserError(
            f"{num_ranks} ranks were asked for, but this machine has {topology.num_gpus} GPUs; start at most that many."
        )
    table = rank_variables(config, topology, num_ranks, os.environ) + launcher_variables(launcher, topology, num_ranks)
    variables, kept = applied(table, os.environ)
    devices = rank_devices(num_ranks, world.has_gpu, os.environ)
    return Plan(config_path, tuple(overrides), config, launcher, world, devices, variables, kept)
