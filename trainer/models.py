"""Models by `transformers` name: configuration, construction on meta, size and arithmetic per token."""

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sharding.blocks import find_blocks
from sharding.errors import UserError
from sharding.float8 import is_fit
from trainer.model_refusals import needs_padding, refuse_padding
from trainer.sections import ModelConfig
from trainer.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Vocabulary:
    """What a model must know of its tokenizer: number of tokens and the id that ends a document."""

    size: int
    eos_token_id: int | None


@dataclass(frozen=True)
class ModelFacts:
    """Size of a model and its arithmetic.

    Attributes:
        num_parameters: all parameters, shared ones once.
        num_matrix_parameters: parameters used in matrix products: an untied input embedding is left out, a tied
            one counts as the output projection. Experts that a token does not visit are counted too.
        num_layers: number of blocks.
        attention_width: heads x head width.
        num_block_linears: linear layers of blocks.
        num_float8_linears: those of them that ``precision.compute=fp8`` multiplies in 8 bits.
    """

    num_parameters: int
    num_matrix_parameters: int
    num_layers: int
    attention_width: int
    num_block_linears: int
    num_float8_linears: int

    def flops_per_token(self, sequence_length: int, *, causal: bool) -> int:
        """Forward and backward floating-point operations per token: 6N + 12Lds, or 6N + 6Lds discounting the mask.

        Source: Chowdhery et al., "PaLM" (2022), appendix B; the causal convention halves the attention term.
        """
        attention = (6 if causal else 12) * self.num_layers * self.attention_width * sequence_length
        return 6 * self.num_matrix_parameters + attention


def build_model_config(model: ModelConfig, vocabulary: Vocabulary, sequence_length: int) -> "PretrainedConfig":
    """The `transformers` configuration of the model that the run trains.

    Raises:
        UserError: the architecture or one of its fields is unknown, the vocabulary is smaller than the tokenizer's,
            or the model has fewer positions than a sequence has tokens.
    """
    from transformers import AutoConfig

    if model.pretrained is not None:
        try:
            config = AutoConfig.from_pretrained(model.pretrained, trust_remote_code=model.trust_remote_code)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            if "trust_remote_code" in str(error):
                reason = "it needs Python code of its own; read that, and set model.trust_remote_code=true to run it."
            raise UserError(f"model.pretrained={model.pretrained} cannot be loaded: {reason}") from None
        if not model.trust_remote_code and hasattr(config, "auto_map"):
            # Where transformers has a class of its own too, that one is meant.
            del config.auto_map
    else:
        config = _config_from_scratch(model, vocabulary, sequence_length)
    config._attn_implementation = model.attention
    _check_sizes(config, vocabulary, sequence_length)
    refuse_padding(model, config)
    return config


def _config_from_scratch(model: ModelConfig, vocabulary: Vocabulary, sequence_length: int) -> "PretrainedConfig":
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    if model.architecture not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(model.architecture), list(CONFIG_MAPPING.keys()), n=3)
        raise UserError(
            f"model.architecture={model.architecture} is not a model type of transformers"
            + (f"; did you mean {' or '.join(close)}?" if close else ".")
        )
    config_class = CONFIG_MAPPING[model.architecture]
    defaults = config_class()
    for key in model.config:
        if not hasattr(defaults, key):
            close = difflib.get_close_matches(key, [k for k in vars(defaults) if not k.startswith("_")], n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise UserError(f"model.config.{key} is not a field of {model.architecture}{hint}")
    # The class's own padding token is one of another tokenizer: here a word, whose embedding would stay zero.
    values: dict[str, Any] = {"vocab_size": vocabulary.size, "pad_token_id": None}
    if vocabulary.eos_token_id is not None:
        values |= {"bos_token_id": vocabulary.eos_token_id, "eos_token_id": vocabulary.eos_token_id}
    positions = getattr(defaults, "max_position_embeddings", None)
    if positions is not None and positions < sequence_length:
        values["max_position_embeddings"] = sequence_length
    values |= model.config
    if model.vocab_multiple > 1 and isinstance(values["vocab_size"], int):
        values["vocab_size"] = -(-values["vocab_size"] // model.vocab_multiple) * model.vocab_multiple
    try:
        return config_class(**values)
    except (TypeError, ValueError, StrictDataclassError) as error:
        if "pad_token_id" in str(error) and "pad_token_id" not in model.config:
            raise needs_padding(str(model.architecture)) from None
        reason = str(error).splitlines()[-1].strip().removeprefix("ValueError: ")
        raise UserError(f"model.config is not accepted by {model.architecture}: {reason}") from None


def _check_sizes(config: "PretrainedConfig", vocabulary: Vocabulary, sequence_length: int) -> None:
    text_config = config.get_text_config()
    if text_config.vocab_size < vocabulary.size:
        raise UserError(
            f"the model's vocab_size={text_config.vocab_size} is smaller than the tokenizer's {vocabulary.size} "
            f"tokens; set model.config.vocab_size to at least that, remove it, or choose another tokenizer."
        )
    positions = max_positions(config)
    if positions is not None and positions < sequence_length:
        raise UserError(
            f"data.sequence_length={sequence_length} is more than the model's {positions} positions; "
            f"lower it or set model.config.max_position_embeddings."
        )


def max_positions(config: "PretrainedConfig") -> int | None:
    """Tokens that a sequence may have, as far as the model's configuration limits them."""
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def build_model_on_meta(task: Task, model_config: "PretrainedConfig") -> nn.Module:
    """The task's model with parameters and buffers that have no memory yet.

    Raises:
        UserError: the model does not accept the configuration.
    """
    try:
        with torch.device("meta"):
            model = task.build_model(model_config)
    except (ImportError, ValueError) as error:
        reason = str(error).splitlines()[0]
        attention = model_config._attn_implementation
        raise UserError(
            f"a {model_config.model_type} with model.attention={attention} cannot be built: {reason}"
        ) from None
    return model


def initialize_module(model: nn.Module, module: nn.Module) -> None:
    """Initialise one module as its model prescribes: `_init_weights` of transformers, else `reset_parameters`."""
    prescribed: Any = getattr(model, "_init_weights", None)
    own: Any = getattr(module, "reset_parameters", None)
    if prescribed is not None:
        prescribed(module)
    elif own is not None:
        own()


def model_facts(model: nn.Module, model_config: "PretrainedConfig") -> ModelFacts:
    """Count a model's parameters; it may be on the meta device, but must not be sharded yet."""
    text_config = model_config.get_text_config()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    get_output: Any = getattr(model, "get_output_embeddings", None)
    output = get_output() if get_output is not None else None
    if output is not None:
        embeddings.discard(id(output.weight))
    parameters = list(model.parameters())
    num_heads = getattr(text_config, "num_attention_heads", 0)
    head_width = getattr(text_config, "head_dim", None) or text_config.hidden_size // max(num_heads, 1)
    in_blocks = [module for _, block in find_blocks(model) for module in block.modules()]
    return ModelFacts(
        num_parameters=sum(p.numel() for p in parameters),
        num_matrix_parameters=sum(p.numel() for p in parameters if p.ndim >= 2 and id(p) not in embeddings),
        num_layers=text_config.num_hidden_layers,
        attention_width=num_heads * head_width,
        num_block_linears=sum(isinstance(module, nn.Linear) for module in in_blocks),
        num_float8_linears=sum(map(is_fit, in_blocks)),
    )
