"""CPU threads of a rank. Imports no torch."""

import os
from collections.abc import Mapping

from sharding.ranks.process_lifetime import ACCELERATE_VARIABLE
from trainer.config import RunConfig
from trainer.runtime.processes import ATTEMPT_VARIABLE


def threads_per_rank(config: RunConfig, local_world_size: int, environment: Mapping[str, str]) -> int:
    """CPU threads of one rank's operators: as configured, else the user's OMP_NUM_THREADS, else a share of the cores.

    Args:
        config: ``launch.threads_per_rank`` decides if it is not 0.
        local_world_size: ranks of this node; the usable cores are divided among them.
        environment: OMP_NUM_THREADS is read here, except in a rank that torchrun or Accelerate started by itself: they
            set it to 1, so there it says nothing about the user's wish.
    """
    own = environment.get("OMP_NUM_THREADS", "")
    by_launcher = "TORCHELASTIC_RUN_ID" in environment or ACCELERATE_VARIABLE in environment
    set_by_launcher = by_launcher and ATTEMPT_VARIABLE not in environment
    if config.launch.threads_per_rank:
        return config.launch.threads_per_rank
    if own.isdigit() and int(own) and not set_by_launcher:
        return int(own)
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)
