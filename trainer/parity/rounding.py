"""Parameters as the rule of precision has them in computing, by torch's own means."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def round_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Round all parameters to a format, in which they are from now on, but for those of batch normalisation.

    torch's batch normalisation takes no other weights than fp32 beside its running statistics; they are rounded too.

    Args:
        model: what computes with them.
        dtype: the format.
    """
    of_norms = {id(p) for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
    for parameter in model.parameters():
        rounded = parameter.data.to(dtype)
        parameter.data = rounded.float() if id(parameter) in of_norms else rounded
