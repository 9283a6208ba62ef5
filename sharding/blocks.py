"""Finding the repeated blocks of a model by its structure."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from torch import nn

from sharding.config import Strategy
from sharding.ranks.errors import UserError


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformer blocks of a model, with their qualified names, in forward order.

    A block is an element of an outermost ``nn.ModuleList`` whose elements all hold parameters. That is how
    decoder and encoder layers are kept in every ``transformers`` architecture, so no table of names is needed; a
    list inside a block (experts, say) belongs to its block. A module that is in a list several times is one block.
    """
    blocks: list[tuple[str, nn.Module]] = []
    _collect(model, "", blocks)
    unique: dict[int, tuple[str, nn.Module]] = {}
    for name, block in blocks:
        unique.setdefault(id(block), (name, block))
    return list(unique.values())


def sharding_units(model: nn.Module, blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Blocks by what must be sharded at once: most alone, those that share parameters with one another together.

    A block that shares parameters with a module outside of blocks, or with another that does, is in no unit: it is
    sharded with what is outside.
    """
    outside = {id(p) for module in modules_outside(model, blocks) for p in module.parameters(recurse=False)}
    # The model stands for what is outside.
    units: list[tuple[set[int], list[nn.Module]]] = [(outside, [model])]
    for block in blocks:
        parameters = {id(parameter) for parameter in block.parameters()}
        tied = [unit for unit in units if not parameters.isdisjoint(unit[0])]
        units = [unit for unit in units if parameters.isdisjoint(unit[0])]
        members = [*(member for _, others in tied for member in others), block]
        units.append((parameters.union(*(others for others, _ in tied)), members))
    return [members for _, members in units if model not in members]


def units_by_last_block(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[int, list[nn.Module]]:
    """``sharding_units`` by the id of the block that comes last in each.

    Each block that shares a parameter draws its initial values anew, so a unit is complete with its last block.
    """
    return {id(members[-1]): members for members in sharding_units(model, blocks)}


def modules_outside(model: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules of a model that are neither blocks nor in one."""
    inside = {id(module) for block in blocks for module in block.modules()}
    return [module for module in model.modules() if id(module) not in inside]


def ends_of_language_model(
    model: nn.Module, blocks: Sequence[nn.Module]
) -> tuple[nn.Embedding | None, list[nn.Module]]:
    """The embedding of a model's tokens, and its final norm and output projection, in forward order.

    None and nothing where the model does not say which they are, as models of ``transformers`` do, where they are tied
    or share parameters with others, and where a projection of another shape leaves open whether logits are made of the
    embedding. A norm is one where it stands alone behind the blocks.
    """
    embedding, head = _asked(model, "get_input_embeddings"), _asked(model, "get_output_embeddings")
    if not isinstance(embedding, nn.Embedding) or head is None:
        return None, []
    projection = head._parameters.get("weight")
    outside = {id(module) for module in modules_outside(model, blocks)}
    if projection is None or projection.shape != embedding.weight.shape or not {id(embedding), id(head)} <= outside:
        return None, []
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    ends = [embedding, *_norm_behind(model, blocks), head]
    if any(uses[id(parameter)] > 1 for module in ends for parameter in module.parameters()):
        return None, []
    return embedding, ends[1:]


def _norm_behind(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """What alone has parameters, all of them vectors, among the modules that stand behind the last block's list."""
    for module in model.modules():
        children = list(module.children())
        for place, child in enumerate(children):
            if isinstance(child, nn.ModuleList) and len(child) and blocks and child[-1] is blocks[-1]:
                behind = [other for other in children[place + 1 :] if _has_parameters(other)]
                is_norm = len(behind) == 1 and all(parameter.ndim == 1 for parameter in behind[0].parameters())
                return behind if is_norm else []
    return []


def _asked(model: nn.Module, method: str) -> nn.Module | None:
    """What a model answers to a question of ``transformers``; some of its models raise where they have none."""
    try:
        answer = getattr(model, method, lambda: None)()
    except (AttributeError, NotImplementedError):
        return None
    return answer if isinstance(answer, nn.Module) else None


def refuse_scattered_layers(model: nn.Module, strategy: Strategy) -> None:
    """Refuse a model most of whose repeated layers are no blocks, where only a block's parameters are whole at a time.

    Raises:
        UserError: they are in no ``nn.ModuleList``; all of them would be gathered at once.
    """
    if strategy not in ("zero3", "hsdp"):
        return
    blocks = [block for _, block in find_blocks(model)]
    in_blocks = {id(p): p.numel() for block in blocks for p in block.parameters()}
    alike: dict[object, list[str]] = defaultdict(list)
    sizes: dict[object, int] = defaultdict(int)
    inside = {id(module) for block in blocks for module in block.modules()}
    for name, module in model.named_modules():
        is_layer_of_torch = type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())
        if id(module) in inside or is_layer_of_torch or isinstance(module, nn.ModuleList):
            continue
        parameters = [(inner, p) for inner, p in module.named_parameters() if id(p) not in in_blocks]
        if name and parameters:
            kind = (type(module), *((inner, p.shape) for inner, p in parameters))
            alike[kind].append(name)
            sizes[kind] += sum(p.numel() for _, p in parameters)
    repeated = {kind: names for kind, names in alike.items() if len(names) > 1}
    largest = max(repeated, key=lambda kind: sizes[kind], default=None)
    if largest is not None and sizes[largest] > sum(in_blocks.values()):
        first, second, *_ = names = repeated[largest]
        raise UserError(
            f"parallel.strategy={strategy} keeps one layer whole at a time, but {type(model).__name__} has "
            f"{len(names)} layers alike ({first}, {second} ...) outside of any torch.nn.ModuleList, by which "
            "layers are found; keep them in one, or use parallel.strategy=zero2."
        )


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the matrices inside the blocks that are no embeddings, as ``named_parameters`` names them."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return {
        f"{block_name}.{name}"
        for block_name, block in find_blocks(model)
        for name, parameter in block.named_parameters()
        if parameter.ndim == 2 and id(parameter) not in embeddings
    }


def layer_weights(model: nn.Module) -> tuple[str, ...]:
    """Names of the trained matrices and kernels of a model's layers, no embeddings, in the model's order."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return tuple(
        name for name, p in model.named_parameters() if p.ndim >= 2 and p.requires_grad and id(p) not in embeddings
    )


def _collect(module: nn.Module, prefix: str, blocks: list[tuple[str, nn.Module]]) -> None:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList) and len(child) and all(_has_parameters(element) for element in child):
            blocks.extend((f"{path}.{index}", element) for index, element in enumerate(child))
        else:
            _collect(child, f"{path}.", blocks)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
