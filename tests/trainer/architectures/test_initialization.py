"""Initial values of what is computed from other parameters."""

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from trainer.architectures.initialization import initialize_module


def test_a_weight_that_is_normalised_has_what_torch_would_give_it() -> None:
    layer = weight_norm(nn.Conv1d(6, 4, 5), name="weight", dim=2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    torch.manual_seed(1)
    for module in layer.modules():
        initialize_module(layer, module)
    torch.manual_seed(1)
    plain = nn.Conv1d(6, 4, 5)
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert torch.allclose(layer.weight, plain.weight, atol=1e-6)
    # What has values keeps them.
    before = [parameter.clone() for parameter in layer.parametrizations.weight.parameters()]  # type: ignore[union-attr]
    initialize_module(layer, layer)
    after = list(layer.parametrizations.weight.parameters())  # type: ignore[union-attr]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
