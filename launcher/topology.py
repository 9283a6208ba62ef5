"""What this machine has: GPUs, without torch, and usable cores."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.config import RunConfig

DEFAULT_CPU_RANKS = 2


@dataclass(frozen=True)
class Topology:
    """One machine's means.

    Attributes:
        num_gpus: GPUs that ranks may use.
        num_cores: cores that this process may run on.
    """

    num_gpus: int
    num_cores: int


def local_topology(environment: Mapping[str, str] | None = None) -> Topology:
    """Look at this machine."""
    environment = os.environ if environment is None else environment
    return Topology(num_gpus=_count_gpus(environment), num_cores=len(os.sched_getaffinity(0)))


def ranks_per_node(config: RunConfig, topology: Topology, requested: int | None) -> int:
    """How many ranks to start here: as asked on the command line or in the file, else one per GPU, else two.

    Strategy ``none`` trains on one rank.
    """
    asked = requested or config.launch.nproc_per_node
    if asked:
        return asked
    if config.parallel.strategy == "none":
        return 1
    return topology.num_gpus or DEFAULT_CPU_RANKS


def _count_gpus(environment: Mapping[str, str]) -> int:
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    finished = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    return sum(line.startswith("GPU ") for line in finished.stdout.splitlines()) if finished.returncode == 0 else 0
