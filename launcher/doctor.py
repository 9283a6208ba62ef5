"""``shardline doctor``: the ranks of this machine, or this process's own where a launcher has started it."""

import os
import subprocess
import sys
from collections.abc import Sequence

from launcher.command import rank_devices, rendezvous_port, torchrun_command
from launcher.import_path import import_variables, module_command
from launcher.topology import DEFAULT_CPU_RANKS, local_topology
from sharding.ranks.errors import EXIT_FAILED
from sharding.ranks.rank_place import place_variables

_MODULE = "trainer.commands.doctor"


def run_doctor(arguments: Sequence[str], nproc_per_node: int | None) -> int:
    """Examine; returns the exit status.

    Args:
        arguments: of ``python -m trainer.commands.doctor``.
        nproc_per_node: ranks on this machine; None means one per GPU, or two.

    Raises:
        UserError: variables of a launcher contradict one another.
    """
    environment = {**os.environ, **import_variables(os.environ)}
    if "RANK" in os.environ or place_variables(os.environ):
        os.execve(sys.executable, module_command(_MODULE, *arguments), environment)  # noqa: S606 - our own module
    topology = local_topology()
    num_ranks = nproc_per_node or topology.num_gpus or DEFAULT_CPU_RANKS
    devices = rank_devices(num_ranks, topology.num_gpus > 0, os.environ)
    command = torchrun_command(arguments, rendezvous_port(0), devices, module=_MODULE)
    # Its report of a rank that ended with 1 says nothing that the doctor has not said better.
    quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    finished = subprocess.run(command, env={**environment, **quiet}, stderr=subprocess.PIPE, text=True, check=False)
    said = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    for line in dict.fromkeys(said):
        print(line, file=sys.stderr)
    if finished.returncode and not said:
        sys.stderr.write(finished.stderr)
    return EXIT_FAILED if finished.returncode else 0
