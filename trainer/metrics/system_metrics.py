"""How busy nodes and GPUs are: each rank measures its part, and the one reduction of a log line carries it."""

import math
import resource
from collections import defaultdict
from collections.abc import Mapping

import psutil
import torch

from sharding.ranks.process_group import Ranks

_NODE_VARIABLES = ("GROUP_RANK", "SLURM_NODEID")
_NAMES = ("cpu_percent", "memory_percent", "gpu_percent", "gpu_memory_percent")
NUM_SYSTEM_VALUES = 1 + len(_NAMES)


class SystemMeter:
    """Measures one rank's GPU and, on the first rank of a node, the node."""

    def __init__(self, ranks: Ranks, environment: Mapping[str, str], *, enabled: bool) -> None:
        """Begin to measure.

        Args:
            ranks: this rank's place.
            environment: the environment variables; torchrun and Slurm number the nodes there.
            enabled: whether to measure at all; all ranks must say the same.
        """
        self._node = node_number(ranks, environment)
        self._measures_node = enabled and ranks.local_rank == 0
        self._device = ranks.device if enabled and ranks.device.type == "cuda" else None
        self._has_gpu_counters = True
        if self._measures_node:
            # The first call has nothing to compare with; later ones give the use since the call before.
            psutil.cpu_percent()

    def measure(self) -> list[float]:
        """``NUM_SYSTEM_VALUES`` numbers: the node, then the metrics in percent; NaN for what is not measured here."""
        cpu = memory = gpu = gpu_memory = math.nan
        if self._measures_node:
            cpu, memory = psutil.cpu_percent(), psutil.virtual_memory().percent
        if self._device is not None:
            # Asks the driver, and does not wait for the device's work.
            free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
            gpu, gpu_memory = self._gpu_percent(self._device), 100 * (1 - free_bytes / total_bytes)
        return [float(self._node), cpu, memory, gpu, gpu_memory]

    def _gpu_percent(self, device: torch.device) -> float:
        """Share of the last moments in which a kernel ran; NaN where the package nvidia-ml-py is not installed."""
        if not self._has_gpu_counters:
            return math.nan
        try:
            return float(torch.cuda.utilization(device))
        except (ImportError, RuntimeError):
            # Of torch's wrapper: no package, or a driver that does not say, as in some containers.
            self._has_gpu_counters = False
            return math.nan


def node_number(ranks: Ranks, environment: Mapping[str, str]) -> int:
    """Number of this rank's node, from 0."""
    for name in _NODE_VARIABLES:
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return ranks.rank // ranks.local_world_size


def system_metrics(rows: torch.Tensor) -> dict[str, float | int | None]:
    """Metrics by node, such as ``system/node-0/cpu_percent``: means over the ranks that measured.

    Args:
        rows: what ``measure`` gave on each rank, [ranks, NUM_SYSTEM_VALUES].
    """
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for node, *values in rows.tolist():
        for name, value in zip(_NAMES, values, strict=True):
            if not math.isnan(value):
                found[int(node), name].append(value)
    return {f"system/node-{node}/{name}": sum(values) / len(values) for (node, name), values in sorted(found.items())}


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory use of this process so far: allocated on CUDA, resident on a CPU; GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
