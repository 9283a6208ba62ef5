"""Settings of a model's own configuration that this training would ignore, or get wrong."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from sharding.parallel_dims import ParallelDims
from sharding.ranks.errors import UserError
from trainer.architectures.config import max_positions
from trainer.architectures.padding import needs_padding, parts_of
from trainer.config import RunConfig
from trainer.tasks.causal_lm import predicts_next_tokens
from trainer.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LAYER_DROP = re.compile(r"layer_?drop$")
_LOSS_COEFFICIENT = re.compile(r"(aux|z)_loss_(coef|coefficient|weight|alpha)$|^moe_loss_weight$")


def refuse_settings(config: RunConfig, task: Task, model_config: "PretrainedConfig", dims: ParallelDims) -> None:
    """Refuse what is to be seen before there is a model.

    Raises:
        UserError: a setting would be ignored, or does not go with the strategy.
    """
    refuse_layer_drop(config, model_config, dims.reduction_degree)
    if predicts_next_tokens(task):
        refuse_auxiliary_losses(config, model_config)


def refuse_auxiliary_losses(config: RunConfig, model_config: "PretrainedConfig") -> None:
    """Refuse what would make transformers add a loss, where the task computes the loss from the logits.

    Raises:
        UserError: the configuration asks for a loss beside the cross-entropy.
    """
    for part in parts_of(model_config):
        found = {name: value for name, value in _numbers(part) if _LOSS_COEFFICIENT.search(name)}
        asked = {name: value for name, value in found.items() if value}
        # A part may have the coefficient alone, and the whole the switch.
        of_router = getattr(part, "output_router_logits", getattr(model_config, "output_router_logits", None))
        # Without a coefficient of its own, the class has a fixed one.
        if not (asked if of_router is None else of_router and (asked or not found)):
            continue
        switch = {} if of_router is None else {"output_router_logits": "true"}
        settings = " and ".join(f"{name}={value}" for name, value in (switch | asked).items())
        first = next(iter(switch | asked))
        raise UserError(
            f"{_where(config, settings)} asks transformers for a loss beside the cross-entropy, but task.name="
            f"{config.task.name} computes the loss from the logits alone; {_remedy(config, first, bool(switch))}"
            + (", or set task.z_loss." if not switch else ", or name a task of your own that adds it.")
        )


def refuse_layer_drop(config: RunConfig, model_config: "PretrainedConfig", num_ranks: int) -> None:
    """Refuse layers that each rank drops by a draw of its own, where all ranks gather each layer together.

    Raises:
        UserError: the configuration has such layers.
    """
    parallel = config.parallel
    if num_ranks == 1 or parallel.strategy in ("none", "ddp") or parallel.backend == "bucketed":
        return
    for part in parts_of(model_config):
        for name, value in _numbers(part):
            if _LAYER_DROP.search(name) and value:
                raise UserError(
                    f"{_where(config, f'{name}={value}')} lets each rank drop other layers, but "
                    f"parallel.strategy={parallel.strategy} of parallel.backend={parallel.backend} needs all "
                    f"{num_ranks} ranks to run the same; {_remedy(config, name, is_switch=False)}, or use "
                    "parallel.strategy=ddp or parallel.backend=bucketed."
                )


def refuse_positions_by_padding(config: RunConfig, model: nn.Module, model_config: "PretrainedConfig") -> None:
    """Refuse a model that counts positions from its padding token, where there is no such token or too few positions.

    Raises:
        UserError: it does.
    """
    counts = ("create_position_ids_from_input_ids", "pad_index")
    found = {name for module in model.modules() for name in counts if hasattr(module, name)}
    padding = getattr(model_config.get_text_config(), "pad_token_id", None)
    if not found:
        return
    if padding is None:
        raise needs_padding(config.model.name)
    length, positions = config.data.sequence_length, max_positions(model_config)
    if counts[0] in found and positions is not None and positions < length + padding + 1:
        raise UserError(
            f"data.sequence_length={length} needs {length} + {padding + 1} positions of a {model_config.model_type}, "
            f"which counts them from its pad_token_id={padding} on, but it has {positions}; set "
            f"model.config.max_position_embeddings to at least {length + padding + 1}, or lower it."
        )


def refuse_encoder(config: RunConfig, model_config: "PretrainedConfig") -> None:
    """Refuse a model that is told by its configuration to see later tokens, where it is to predict the next one.

    What is not to be told so is asked on the ranks: see ``trainer.model.causality``.

    Raises:
        UserError: it is an encoder.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    # Some decoders have the field and do not read it.
    if getattr(model_config, "is_decoder", True) or type(model_config) not in MODEL_FOR_MASKED_LM_MAPPING:
        return
    where = "in its config.json" if config.model.pretrained is not None else "in model.config"
    raise UserError(
        f"{config.model.name} is an encoder (is_decoder=false), which sees the tokens that it is to predict; choose a "
        f"causal architecture (llama, gpt2, say), task.name=masked-lm, or set is_decoder to true {where}."
    )


def _where(config: RunConfig, settings: str) -> str:
    if config.model.pretrained is not None:
        return f"model.pretrained={config.model.pretrained}, whose config.json has {settings},"
    return "model.config." + settings.replace(" and ", " with model.config.")


def _remedy(config: RunConfig, name: str, is_switch: bool) -> str:
    value = "false" if is_switch else "0"
    return f"set {name} to {value} in that file" if config.model.pretrained is not None else f"set it to {value}"


def _numbers(part: Any) -> Iterator[tuple[str, float]]:
    for name, value in vars(part).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value
