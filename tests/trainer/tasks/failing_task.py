"""A task whose ranks fail, by the number of sequences in a micro-batch."""

import os
import signal

from torch import nn

from sharding.engine import Batch
from trainer.tasks.causal_lm import CausalLanguageModelling
from trainer.tasks.task import Outputs

RAISES_AT = 3
IS_KILLED_AT = 2


class FailingTask(CausalLanguageModelling):
    """Language modelling that one of the two ways to fail strikes."""

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """See Task."""
        if len(batch["labels"]) == RAISES_AT:
            raise ValueError("struck on purpose")
        if len(batch["labels"]) == IS_KILLED_AT and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(model, batch)
