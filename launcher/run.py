"""``shardline run``: from a configuration file to the exit status of a run."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

from launcher.command import rendezvous_port, torchrun_command
from launcher.environment import applied, rank_variables
from launcher.local import run_ranks
from launcher.topology import Topology, local_topology, ranks_per_node
from sharding.errors import EXIT_FINISHED, UserError
from trainer.config import RunConfig, World, accumulation_steps, load_config, validate
from trainer.data.prepared import PreparedCorpus, find_prepared
from trainer.lease import Lease
from trainer.run_folder import RunFolder


def run(config_path: str, overrides: Sequence[str], nproc_per_node: int | None, launcher: str, dry_run: bool) -> int:
    """Check everything that can be known before ranks start, then start them and see them through.

    Returns:
        The exit status of the run.

    Raises:
        UserError: something that the user can mend is wrong.
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
    added, kept = applied(rank_variables(config, topology, num_ranks), os.environ)
    if dry_run:
        _print_plan(config, config_path, overrides, topology, num_ranks, kept)
        return EXIT_FINISHED
    run_folder = RunFolder(config.run_dir)
    run_folder.check(config)
    if run_folder.is_complete(config):
        print(
            f"run {config.name} is complete at step {config.steps}; nothing to do "
            f"(raise steps to train on, or choose another name): {run_folder.path}"
        )
        return EXIT_FINISHED
    port = rendezvous_port(config.launch.master_port)
    lease = Lease.acquire(run_folder.path)
    try:
        _check_vocabulary(config, _prepared_corpus(config, config_path, overrides))
        for sentence in kept:
            print(f"note: {sentence}")
        attempt = run_folder.begin_attempt(config, world, sys.argv)
        command = torchrun_command(config_path, overrides, num_ranks, port)
        return run_ranks(command, added, run_folder, attempt, lease.token)
    finally:
        lease.release()


def _prepared_corpus(config: RunConfig, config_path: str, overrides: Sequence[str]) -> PreparedCorpus:
    """The prepared corpus; prepared in a process of its own, since it needs libraries that this one must not load."""
    found = find_prepared(config.data)
    if found is not None:
        return found
    command = [sys.executable, "-m", "launcher.child", sys.executable, "-m", "trainer.data.prepare", config_path]
    finished = subprocess.run([*command, *overrides], stdin=subprocess.DEVNULL, check=False)
    if finished.returncode:
        # The child has said why.
        raise SystemExit(finished.returncode)
    found = find_prepared(config.data)
    if found is None:
        raise UserError("the corpus changed while it was being prepared; run again.")
    return found


def _check_vocabulary(config: RunConfig, corpus: PreparedCorpus) -> None:
    wanted = config.model.config.get("vocab_size")
    if isinstance(wanted, int) and wanted < corpus.vocab_size:
        raise UserError(
            f"model.config.vocab_size={wanted} is smaller than the tokenizer's {corpus.vocab_size} tokens; set it to at "
            f"least {corpus.vocab_size}, or remove it."
        )


def _print_plan(
    config: RunConfig,
    config_path: str,
    overrides: Sequence[str],
    topology: Topology,
    num_ranks: int,
    kept: Sequence[str],
) -> None:
    command = torchrun_command(config_path, overrides, num_ranks, config.launch.master_port)
    steps = accumulation_steps(config, num_ranks)
    tokens = config.batch.global_size * config.data.sequence_length
    device = "GPU, NCCL" if topology.num_gpus else "CPU, gloo"
    print(f"run folder    {config.run_dir}")
    print(f"ranks         {num_ranks} ({device}), strategy {config.parallel.strategy}")
    print(
        f"batch         {config.batch.global_size} sequences = {config.batch.micro_size} x {steps} accumulation steps "
        f"x {num_ranks} ranks; {tokens:,} tokens a step, {tokens * config.steps:,} in {config.steps} steps"
    )
    print("environment")
    for variable in rank_variables(config, topology, num_ranks):
        if variable.name not in os.environ:
            print(f"  {variable.name}={variable.value}    # {variable.why}")
    for sentence in kept:
        print(f"  # {sentence}")
    if config.launch.master_port == 0:
        print("command       (port 0 becomes a free one)")
    else:
        print("command")
    print(f"  {shlex.join(command)}")
