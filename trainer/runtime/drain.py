"""Draining: rank 0 has work to do when training is over, and the others stay until it is done.

Launchers take a rank that ends with 75 for a failure and end the others: torchrun and DeepSpeed's after 30 s,
``srun --kill-on-bad-exit`` at once. Trackers that still send would be cut short, and the run's lease would stay.
"""

import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from sharding.ranks.process_group import Ranks

# Trackers have a minute, and the report reads all of the run's metrics.
_WITHIN_S = 600.0
_LOOK_EVERY_S = 0.1
_KEY = "shardline/drained"


class Drain:
    """What rank 0 does after training, as the other ranks know of it: through the store where they met."""

    def __init__(self, ranks: Ranks) -> None:
        """Make it while the process group is there; it outlives the group."""
        self._rank = ranks.rank
        # Where rank 0 is the server, this also keeps it up.
        self._store: dist.Store | None = _get_default_store() if ranks.world_size > 1 else None

    def finish(self, within_s: float = _WITHIN_S) -> None:
        """On rank 0, say that all is done; elsewhere, wait until it has said so or is gone.

        Args:
            within_s: how long to wait at most.
        """
        if self._store is None:
            return
        deadline = time.monotonic() + within_s
        try:
            if self._rank == 0:
                self._store.set(_KEY, "")
            # Looked for again and again, since a signal would have to wait for the end of a blocking call.
            while self._rank != 0 and not self._store.check([_KEY]) and time.monotonic() < deadline:
                time.sleep(_LOOK_EVERY_S)
        except RuntimeError:
            # Rank 0 or the agent that keeps the store is gone, so there is nobody to wait for.
            return
