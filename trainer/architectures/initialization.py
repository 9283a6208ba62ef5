"""How one module of a model gets its initial values."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from sharding.ranks.errors import UserError
from trainer.architectures.faults import faults_of_a_configuration, is_raised_by_transformers, reason


def initialize_module(model: nn.Module, module: nn.Module) -> None:
    """Initialise one module as its model prescribes: `_init_weights` of transformers, else its own method.

    Modules of torch that a model's `_init_weights` passes over, such as `nn.MultiheadAttention`, have their own too.

    Raises:
        UserError: the method of transformers fails.
    """
    _initialize_parametrized(module)
    prescribed: Any = getattr(model, "_init_weights", None)
    if prescribed is not None:
        try:
            prescribed(module)
        except faults_of_a_configuration() as error:
            if not is_raised_by_transformers(error):
                raise
            raise UserError(
                f"transformers cannot initialise {type(module).__name__}: {reason(error)}; set other fields of "
                "model.config, or choose another model.architecture."
            ) from None
        if not _lacks_values(module):
            return
    own: Any = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if own is not None and (hasattr(module, "reset_parameters") or _lacks_values(module)):
        own()
    elif prescribed is not None:
        _initialize_as_constructed(module)


def _initialize_parametrized(module: nn.Module) -> None:
    """Weights that are computed from others, as by weight normalisation: those others follow from torch's own values.

    To write to a computed weight has no effect, which is what `_init_weights` of some models does.
    """
    if not parametrize.is_parametrized(module):
        return
    for name, parametrization in module.parametrizations.items():  # type: ignore[operator, union-attr]
        weight = getattr(module, name)
        if _lacks_values(parametrization) and weight.ndim >= 2:
            values = torch.empty_like(weight)
            # As torch's layers do, and what their constructor would have left.
            nn.init.kaiming_uniform_(values, a=math.sqrt(5))
            setattr(module, name, values)


def _lacks_values(module: nn.Module) -> bool:
    """Whether a tensor of the module's own still holds the NaN that memory was filled with."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(t is not None and t.is_floating_point() and bool(t.isnan().any()) for t in tensors)


def _initialize_as_constructed(module: nn.Module) -> None:
    """Modules of transformers that get values in their constructor and nowhere else."""
    from transformers.activations import XIELUActivation
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, XIELUActivation):
        module.load_state_dict(XIELUActivation(dtype=module.alpha_p.dtype).state_dict())
    elif isinstance(module, Conv1D):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
