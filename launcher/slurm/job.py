"""First step of a Slurm job: ``python -m launcher.slurm.job torchrun|deepspeed|srun CONFIG [key=value ...]``.

It checks what can be known before ranks start, prepares the corpus, and prints what ``slurm/job.sh`` needs to know, as
shell assignments on standard output; all else goes to standard error.
"""

import contextlib
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.environment import applied, rank_variables
from launcher.import_path import import_variables, module_command
from launcher.slurm.allocation import RANKS_VARIABLE, Allocation, ranks_of, read_allocation
from launcher.slurm.port import meeting_port
from launcher.topology import local_topology
from sharding.ranks.errors import UserError, ends_with_a_sentence
from trainer.attempt import check_continuation
from trainer.checkpoint.trained_corpus import trained_fingerprints
from trainer.config import RunConfig, config_to_yaml, load_config
from trainer.config.rules import World, validate
from trainer.config.stages import errors_of_stage, stages_of
from trainer.data.prepared_stages import find_stages
from trainer.files.atomic_files import write_atomically
from trainer.run_folder.folder import RunFolder

_STARTERS = ("torchrun", "deepspeed", "srun")


def prepare_job(arguments: Sequence[str], starter: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Check a job and see to its corpus.

    Args:
        arguments: configuration file and overrides.
        starter: what starts the ranks of a node: torchrun, deepspeed or srun itself.
        environment: that of the batch script.

    Returns:
        Shell variables: ``run_dir``, ``config_file`` (what ranks are given), ``ranks_per_node``, ``max_restarts``, and
        those that ranks are started with.

    Raises:
        UserError: something that the user can mend is wrong.
    """
    config = load_config(arguments[0], arguments[1:])
    allocation = read_allocation(environment)
    ranks = ranks_of(allocation, config, one_task_per_rank=starter == "srun")
    topology = local_topology()
    world = World(allocation.num_nodes * ranks, has_gpu=topology.num_gpus > 0)
    validate(config, world)
    run_folder = RunFolder(config.run_dir)
    check_continuation(run_folder, config)
    config_file = _freeze(config, run_folder, allocation.job_id)
    _check_vocabulary_and_corpus(config, config_file, trained_fingerprints(config, run_folder))
    _describe(config, allocation, ranks, world)
    # Threads are each rank's own matter: this step has not the cores that a rank will have.
    table = rank_variables(config, topology, ranks, environment, allocation.num_nodes)
    added, kept = applied([v for v in table if v.name != "OMP_NUM_THREADS"], environment)
    for sentence in kept:
        print(f"note: {sentence}", file=sys.stderr)
    return {
        "run_dir": str(run_folder.path.absolute()),
        "config_file": str(config_file),
        "ranks_per_node": str(ranks),
        "max_restarts": str(config.faults.max_restarts),
        RANKS_VARIABLE: str(ranks),
        # Last, since preparing a corpus can take an hour.
        "MASTER_PORT": str(meeting_port(config, environment)),
        **{variable.name: variable.value for variable in added},
    }


def _check_vocabulary_and_corpus(config: RunConfig, config_file: Path, fingerprints: Mapping[str, str]) -> None:
    if find_stages(config, fingerprints) is None:
        # Standard output is the batch script's to read.
        command = module_command("trainer.commands.prepare_data", str(config_file))
        environment = {**os.environ, **import_variables(os.environ)}
        status = subprocess.run(command, stdout=sys.stderr, env=environment, check=False).returncode
        if status:
            # It has said why.
            raise SystemExit(status if status > 0 else 1)
    corpora = find_stages(config, fingerprints)
    if corpora is None:
        raise UserError("the corpus changed while it was being prepared; submit the job again.")
    for stage, corpus in zip(stages_of(config), corpora, strict=True):
        with errors_of_stage(stage.name):
            corpus.check_sequence_length(stage.config.data.sequence_length)


def _freeze(config: RunConfig, run_folder: RunFolder, job_id: int) -> Path:
    """Write down what this start of the job runs with, so that all ranks and restarts of its step have the same."""
    file = run_folder.path.absolute() / "slurm" / f"job-{job_id}.config.yaml"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, config_to_yaml(config))
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}; choose another output_dir.") from None
    return file


def _describe(config: RunConfig, allocation: Allocation, ranks: int, world: World) -> None:
    kind = "GPUs" if allocation.gpus_per_node else "tasks"
    print(
        f"job {allocation.job_id}: {allocation.num_nodes} nodes x {ranks} {kind} = {world.num_ranks} ranks, "
        f"{config.parallel.backend} {config.parallel.strategy}; run folder {config.run_dir}",
        file=sys.stderr,
    )
    if allocation.gpus_per_node and not world.has_gpu:
        print(
            f"note: torch sees no GPU on {socket.gethostname()}; ranks compute on the CPU, one for each GPU asked for",
            file=sys.stderr,
        )


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Print the assignments; returns the exit status."""
    starter, *arguments = arguments
    if starter not in _STARTERS:
        raise UserError(f"{starter} does not start ranks; write one of {', '.join(_STARTERS)} first.")
    if not arguments:
        raise UserError("no configuration given; write sbatch SCRIPT CONFIG [key=value ...].")
    with contextlib.redirect_stdout(sys.stderr):
        variables = prepare_job(arguments, starter, os.environ)
    print_variables(variables)
    return 0


def print_variables(variables: Mapping[str, str]) -> None:
    """Tell them to ``slurm/job.sh``, which reads standard output and takes nothing but such lines for variables."""
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
