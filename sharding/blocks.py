"""Finding the repeated blocks of a model by its structure."""

from collections.abc import Iterable

from torch import nn


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformer blocks of a model, with their qualified names, in forward order.

    A block is an element of an outermost ``nn.ModuleList`` whose elements all hold parameters. That is how
    decoder and encoder layers are kept in every ``transformers`` architecture, so no table of names is needed; a
    list inside a block (experts, say) belongs to its block.
    """
    blocks: list[tuple[str, nn.Module]] = []
    _collect(model, "", blocks)
    return blocks


def modules_outside(model: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules of a model that are neither blocks nor in one."""
    inside = {id(module) for block in blocks for module in block.modules()}
    return [module for module in model.modules() if id(module) not in inside]


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the matrices inside the blocks that are no embeddings, as ``named_parameters`` names them."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return {
        f"{block_name}.{name}"
        for block_name, block in find_blocks(model)
        for name, parameter in block.named_parameters()
        if parameter.ndim == 2 and id(parameter) not in embeddings
    }


def _collect(module: nn.Module, prefix: str, blocks: list[tuple[str, nn.Module]]) -> None:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList) and len(child) and all(_has_parameters(element) for element in child):
            blocks.extend((f"{path}.{index}", element) for index, element in enumerate(child))
        else:
            _collect(child, f"{path}.", blocks)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
