"""A task whose ranks fail, by the number of sequences in a micro-batch."""

import os
import signal

import torch
from torch import nn

from sharding.engine import Batch
from trainer.tasks.causal_lm import CausalLanguageModelling

RAISES_AT = 3
IS_KILLED_AT = 2


class FailingTask(CausalLanguageModelling):
    """Language modelling that one of the two ways to fail strikes."""

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """See Task."""
        if len(batch["labels"]) == RAISES_AT:
            raise ValueError("struck on purpose")
        if len(batch["labels"]) == IS_KILLED_AT and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch)
