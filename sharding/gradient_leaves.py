"""The tensors that autograd accumulates a model's gradients for."""

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def gradient_leaves(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameter name to its leaf, of those that are trained; every rank must call it.

    Under ``fully_shard`` these are the gathered parameters; each comes into being with the first gathering of its
    module, here if need be, and stays the same object from then on. A tied parameter is there under all its names.
    """
    leaves = {name: p for name, p in model.named_parameters(remove_duplicate=False) if not isinstance(p, DTensor)}
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for prefix, module in modules.items():
        if isinstance(module, FSDPModule):
            module.unshard()
            for name, parameter in module.named_parameters(prefix, remove_duplicate=False):
                if not isinstance(parameter, DTensor):
                    leaves[name] = parameter
            module.reshard()
    return {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
