"""What this machine has: GPUs, without torch, and usable cores."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from trainer.config import RunConfig

DEFAULT_CPU_RANKS = 2
_NVIDIA_SMI_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Topology:
    """One machine's means.

    Attributes:
        num_gpus: GPUs that ranks may use.
        num_cores: cores that this process may run on.
    """

    num_gpus: int
    num_cores: int


def local_topology() -> Topology:
    """Look at this machine. A torch that was built without CUDA cannot use a GPU, so there is none then."""
    num_gpus = 0 if _is_cpu_build(_torch_version()) else visible_gpus(os.environ, _installed_gpus())
    return Topology(num_gpus=num_gpus, num_cores=len(os.sched_getaffinity(0)))


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


def visible_gpus(environment: Mapping[str, str], installed: int) -> int:
    """How many of the installed GPUs CUDA_VISIBLE_DEVICES leaves visible.

    As CUDA does it: the list counts up to its first entry that names no device.
    """
    text = environment.get("CUDA_VISIBLE_DEVICES")
    if text is None or installed == 0:
        return installed
    num_visible = 0
    for entry in text.split(","):
        device = entry.strip()
        if not device.startswith(("GPU-", "MIG-")) and not (device.isdigit() and int(device) < installed):
            break
        num_visible += 1
    return num_visible


def _installed_gpus() -> int:
    try:
        finished = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False
        )
        if finished.returncode == 0:
            return sum(line.startswith("GPU ") for line in finished.stdout.splitlines())
    except (OSError, subprocess.TimeoutExpired):
        # Slim containers may lack the tool; the driver lists its devices too.
        pass
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _torch_version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def _is_cpu_build(torch_version: str) -> bool:
    return torch_version.endswith("+cpu")
