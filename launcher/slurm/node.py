"""One node's part of a Slurm job: ``python -m launcher.slurm.node torchrun|deepspeed CONFIG [key=value ...]``.

It starts the launcher's agent of its node. Slurm signals a step's tasks, and an agent would end its ranks before they
have saved, or die and leave them; so the signal becomes the run's stop file, and the agent never sees it.
"""

import contextlib
import os
import shlex
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import BinaryIO

from launcher.child import start_child
from launcher.command import Place, deepspeed_command, rank_devices, torchrun_command
from launcher.conclusion import record_crash
from launcher.environment import applied, launcher_variables, rank_variables
from launcher.rank_exits import RankExits
from launcher.slurm.allocation import RANKS_VARIABLE
from launcher.topology import local_topology
from sharding.ranks.errors import EXIT_BAD_INPUT, EXIT_FINISHED, EXIT_STOPPED, UserError
from sharding.ranks.sentences import print_error
from sharding.ranks.slurm_step import first_host
from trainer.config import load_config
from trainer.run_folder.folder import RunFolder
from trainer.runtime.stopping import stop_signals

_COMMANDS = {"torchrun": torchrun_command, "deepspeed": deepspeed_command}
_LOOK_EVERY_S = 0.2


class _StopSignal:
    """The first signal that asked this node to stop, by name; empty before."""

    def __init__(self) -> None:
        self.name = ""

    def receive(self, number: int, _frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name


def run_node(launcher: str, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Start the ranks of this node and see them through; call it from the main thread.

    Args:
        launcher: torchrun or deepspeed.
        arguments: configuration file and overrides.
        environment: that of a step with one task a node.

    Returns:
        0 where the run is finished, or stopped and saved: another status of a task would have srun end the others,
        rank 0 among them, which may still be at its last work. Else the agent's exit status, as a shell would say it.

    Raises:
        UserError: the step is not what the batch script should have started.
    """
    stop = _StopSignal()
    for number in stop_signals():
        signal.signal(number, stop.receive)
    num_ranks, place = _read_step(environment)
    config = load_config(arguments[0], arguments[1:])
    run_folder = RunFolder(config.run_dir)
    before = _outcome_id(run_folder)
    topology = local_topology()
    devices = rank_devices(num_ranks, topology.num_gpus > 0, environment)
    command = _COMMANDS[launcher](arguments, int(environment["MASTER_PORT"]), devices, place)
    table = rank_variables(config, topology, num_ranks, environment, place.num_nodes)
    variables, _ = applied(table + launcher_variables(launcher, topology, num_ranks), environment)
    if place.node_rank == 0:
        print(f"{socket.gethostname()}: {shlex.join(command)}", file=sys.stderr)
    with _open_log(run_folder, place.node_rank) as log:
        began_at = log.tell()
        child_environment = {**environment, **{variable.name: variable.value for variable in variables}}
        with start_child(command, child_environment, shielded=True, stderr=log) as agent:
            exits = RankExits(agent.pid)
            with contextlib.closing(exits):
                while agent.poll() is None:
                    if stop.name:
                        _ask_to_stop(run_folder, stop.name)
                    exits.wait(_LOOK_EVERY_S)
        if exits.first_failure is not None:
            record_crash(run_folder, exits)
        if not agent.returncode or (_outcome_id(run_folder) != before and not _has_failed(run_folder)):
            return EXIT_FINISHED
        log.seek(began_at)
        sys.stderr.write(log.read().decode(errors="replace"))
    return agent.returncode if agent.returncode >= 0 else 128 - agent.returncode


def _open_log(run_folder: RunFolder, node_rank: int) -> BinaryIO:
    """Where agent and ranks write errors: torchrun's report of ranks that stopped and saved would be taken for one."""
    path = run_folder.path / "logs" / f"launcher.node-{node_rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("a+b")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another output_dir.") from None
    log.seek(0, os.SEEK_END)
    return log


def _outcome_id(run_folder: RunFolder) -> tuple[int, int] | None:
    """Which outcome there is: until the attempt begins, that of the one before is still there."""
    try:
        facts = run_folder.outcome_file.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns


def _has_failed(run_folder: RunFolder) -> bool:
    outcome = run_folder.read_outcome()
    return outcome is None or outcome["exit_code"] not in (EXIT_FINISHED, EXIT_STOPPED)


def _ask_to_stop(run_folder: RunFolder, name: str) -> None:
    """Again and again, for an attempt that is only beginning removes the file that it finds."""
    if run_folder.stop_file.exists() or run_folder.outcome_file.exists():
        return
    # A full disk, or a folder that is not there yet: the next look may succeed.
    with contextlib.suppress(OSError):
        run_folder.request_stop(f"signal {name} to {socket.gethostname()}")


def _read_step(environment: Mapping[str, str]) -> tuple[int, Place]:
    """Ranks of this node, and its place among the nodes."""
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST", "SLURM_NODEID", RANKS_VARIABLE)
    missing = [name for name in (*names, "MASTER_PORT") if name not in environment]
    if missing:
        raise UserError(f"{', '.join(missing)} is not set; let srun start this from a script such as pretrain.sbatch.")
    num_tasks, num_nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_STEP_NUM_NODES"])
    if num_tasks != num_nodes:
        raise UserError(
            f"srun started {num_tasks} tasks on {num_nodes} nodes, but each node has one agent; "
            "use srun --ntasks=$SLURM_NNODES --ntasks-per-node=1."
        )
    num_ranks = int(environment[RANKS_VARIABLE])
    num_gpus = int(environment.get("SLURM_GPUS_ON_NODE") or num_ranks)
    if num_gpus != num_ranks:
        raise UserError(
            f"node {socket.gethostname()} has {num_gpus} GPUs, but the job's first node has {num_ranks}; "
            "ask for --gpus-per-node instead of --gpus."
        )
    host = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
    return num_ranks, Place(num_nodes, int(environment["SLURM_NODEID"]), host)


if __name__ == "__main__":
    try:
        sys.exit(run_node(sys.argv[1], sys.argv[2:], os.environ))
    except UserError as error:
        print_error(str(error))
        sys.exit(EXIT_BAD_INPUT)
