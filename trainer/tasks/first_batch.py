"""The forward pass of a task's model, whose first batch tells whether its sizes fit together."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from trainer.architectures.faults import cannot_compute, faults_of_a_configuration


class ForwardPass:
    """Runs models, and says of one that cannot compute on its first batch what is to blame."""

    def __init__(self) -> None:
        """No model has computed yet."""
        self._has_computed: WeakSet[nn.Module] = WeakSet()

    def logits(self, model: nn.Module, inputs: Mapping[str, Any], described: str) -> torch.Tensor:
        """What a model makes of its inputs: its ``logits``, or all that it returns.

        Args:
            model: the model.
            inputs: arguments of its forward pass.
            described: these, in words.

        Raises:
            UserError: it cannot compute on its first batch, for sizes that do not fit together.
        """
        try:
            made = model(**inputs)
        except faults_of_a_configuration() as error:
            refusal = None if model in self._has_computed else cannot_compute(error, described)
            if refusal is None:
                raise
            raise refusal from None
        self._has_computed.add(model)
        logits: torch.Tensor = getattr(made, "logits", made)
        return logits
