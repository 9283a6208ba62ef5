"""Models by `transformers` name: configuration, construction on meta, size and arithmetic per token."""

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sharding.blocks import find_blocks
from sharding.float8 import is_fit
from sharding.ranks.errors import UserError
from trainer.config.sections import ModelConfig
from trainer.model.refusals import needs_padding, refuse_padding
from trainer.tasks.model_faults import faults_of_a_configuration, is_raised_by_transformers, reason
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
    from transformers import CONFIG_MAPPING

    if model.architecture not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(model.architecture), list(CONFIG_MAPPING.keys()), n=3)
        raise UserError(
            f"model.architecture={model.architecture} is not a model type of transformers"
            + (f"; did you mean {' or '.join(close)}?" if close else ".")
        )
    config_class = CONFIG_MAPPING[model.architecture]
    try:
        defaults = config_class()
        text_name = _text_part(model, defaults)
        text_defaults = getattr(defaults, text_name) if text_name else defaults
    except faults_of_a_configuration() as error:
        raise UserError(
            f"model.architecture={model.architecture} cannot be trained from scratch: {reason(error)}."
        ) from None
    for key in model.config:
        _check_field(model, key, defaults)
    given = model.config.get(text_name, {}) if text_name else model.config
    if not isinstance(given, dict):
        raise UserError(f"model.config.{text_name}={given} must be a mapping of fields, such as {{hidden_size: 256}}.")
    values = _for_vocabulary(vocabulary, sequence_length, text_defaults) | given
    if model.vocab_multiple > 1 and isinstance(values["vocab_size"], int):
        values["vocab_size"] = -(-values["vocab_size"] // model.vocab_multiple) * model.vocab_multiple
    try:
        config: PretrainedConfig = config_class(**(model.config | {text_name: values} if text_name else values))
    except faults_of_a_configuration() as error:
        if "pad_token_id" in str(error) and "pad_token_id" not in given:
            raise needs_padding(str(model.architecture)) from None
        raise UserError(f"model.config is not accepted by {model.architecture}: {reason(error)}.") from None
    theta = given.get("rope_theta")
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if theta is not None and rope.get("rope_theta") != theta:
        raise UserError(
            f"model.config.rope_theta={theta} does not reach the rotary embeddings of {model.architecture}; set "
            f"model.config.rope_parameters, whose default is {rope}."
        )
    _fill_in(config.get_text_config())
    return config


def _text_part(model: ModelConfig, defaults: "PretrainedConfig") -> str | None:
    """Name of the part of a configuration that is the language model's; None where that is all of it.

    Raises:
        UserError: the part is an architecture of its own.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = defaults.get_text_config()
    name = next((name for name in defaults.sub_configs if getattr(defaults, name, None) is text), None)
    if name is not None and text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"model.architecture={model.architecture} has parts for more than text, which text leaves untrained; set "
            f"model.architecture={text.model_type}, with the fields of model.config.{name} as model.config."
        )
    return name


def _check_field(model: ModelConfig, key: str, defaults: "PretrainedConfig") -> None:
    own = {
        "attn_implementation": "model.attention",
        "_attn_implementation": "model.attention",
        "dtype": "precision.compute",
        "torch_dtype": "precision.compute",
    }
    if key in own:
        raise UserError(f"model.config.{key} is set by {own[key]}; remove it there and set that.")
    if _has_field(defaults, key) or (key == "rope_theta" and hasattr(defaults, "rope_parameters")):
        return
    close = difflib.get_close_matches(key, [k for k in vars(defaults) if not k.startswith("_")], n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    raise UserError(f"model.config.{key} is not a field of {model.architecture}{hint}")


def _for_vocabulary(vocabulary: Vocabulary, sequence_length: int, defaults: "PretrainedConfig") -> dict[str, Any]:
    """Fields of a language model's configuration that follow from the tokenizer and the length of sequences."""
    # The class's own padding token is one of another tokenizer: here a word, whose embedding would stay zero.
    values: dict[str, Any] = {"vocab_size": vocabulary.size, "pad_token_id": None}
    if vocabulary.eos_token_id is not None:
        values |= {"bos_token_id": vocabulary.eos_token_id, "eos_token_id": vocabulary.eos_token_id}
    if _field(defaults, "vocab_size_per_layer_input"):
        # A second table of embeddings, by the same ids.
        values["vocab_size_per_layer_input"] = vocabulary.size
    positions = max_positions(defaults)
    if positions is not None and positions < sequence_length:
        values["max_position_embeddings"] = sequence_length
    return values


def _fill_in(config: "PretrainedConfig") -> None:
    """Give values to what some configurations leave open and their models then fail on."""
    num_heads, hidden_size = _field(config, "num_attention_heads"), _field(config, "hidden_size")
    if not num_heads or not hidden_size or getattr(config, "is_heterogeneous", False):
        return
    for name, value in (("num_key_value_heads", num_heads), ("head_dim", hidden_size // num_heads)):
        if name in vars(config) and _field(config, name) is None:
            setattr(config, name, value)


def _has_field(config: "PretrainedConfig", name: str) -> bool:
    try:
        return hasattr(config, name)
    except (RuntimeError, NotImplementedError):
        return True


def _field(config: "PretrainedConfig", name: str) -> Any:
    """A field of a configuration; None where it has none, or several, one for each layer."""
    try:
        return getattr(config, name, None)
    # Of transformers, for a field that differs between layers, and for some that an architecture must not have.
    except (RuntimeError, NotImplementedError):
        return None


def _check_sizes(config: "PretrainedConfig", vocabulary: Vocabulary, sequence_length: int) -> None:
    text_config = config.get_text_config()
    vocab_size = _field(text_config, "vocab_size")
    if vocab_size is None or vocab_size < vocabulary.size:
        raise UserError(
            f"the model's vocab_size={vocab_size} is smaller than the tokenizer's {vocabulary.size} "
            f"tokens; set model.config.vocab_size to at least that, remove it, or choose another tokenizer."
        )
    num_heads, num_pairs = _field(text_config, "num_attention_heads"), _field(text_config, "num_key_value_heads")
    if isinstance(num_heads, int) and isinstance(num_pairs, int) and num_pairs > 0 and num_heads % num_pairs:
        raise UserError(
            f"the model's num_key_value_heads={num_pairs} does not divide its num_attention_heads={num_heads}; set one "
            "of them in model.config so that it does."
        )
    positions = max_positions(config)
    if positions is not None and positions < sequence_length:
        raise UserError(
            f"data.sequence_length={sequence_length} is more than the model's {positions} positions; "
            f"lower it or set model.config.max_position_embeddings."
        )


def max_positions(config: "PretrainedConfig") -> int | None:
    """Tokens that a sequence may have, as far as the model's configuration limits them."""
    positions = _field(config.get_text_config(), "max_position_embeddings")
    # Some that have no limit say -1.
    return positions if isinstance(positions, int) and positions > 0 else None


def build_model_on_meta(task: Task, model_config: "PretrainedConfig") -> nn.Module:
    """The task's model with parameters and buffers that have no memory yet.

    Raises:
        UserError: the model does not accept the configuration.
    """
    try:
        with torch.device("meta"):
            return task.build_model(model_config)
    except (ImportError, ValueError) as error:
        raise _not_built(model_config, error) from None
    except faults_of_a_configuration() as error:
        if not is_raised_by_transformers(error):
            raise
        raise _not_built(model_config, error) from None


def _not_built(model_config: "PretrainedConfig", error: Exception) -> UserError:
    kind, attention = model_config.model_type, model_config._attn_implementation
    if "attention implementation" in str(error) and attention != "eager":
        # transformers names a setting of its own.
        return UserError(f"a {kind} does not have model.attention={attention}; set model.attention=eager.")
    return UserError(
        f"a {kind} with model.attention={attention} cannot be built: {reason(error)}; set other fields of "
        "model.config, or choose another model.architecture."
    )


def model_facts(model: nn.Module, model_config: "PretrainedConfig") -> ModelFacts:
    """Count a model's parameters; it may be on the meta device, but must not be sharded yet."""
    text_config = model_config.get_text_config()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    output = _output_embeddings(model)
    if output is not None:
        embeddings.discard(id(output.weight))
    parameters = list(model.parameters())
    blocks = find_blocks(model)
    num_layers = _field(text_config, "num_hidden_layers") or len(blocks)
    in_blocks = [module for _, block in blocks for module in block.modules()]
    return ModelFacts(
        num_parameters=sum(p.numel() for p in parameters),
        num_matrix_parameters=sum(p.numel() for p in parameters if p.ndim >= 2 and id(p) not in embeddings),
        num_layers=num_layers,
        attention_width=_attention_width(text_config),
        num_block_linears=sum(isinstance(module, nn.Linear) for module in in_blocks),
        num_float8_linears=sum(map(is_fit, in_blocks)),
    )


def _output_embeddings(model: nn.Module) -> Any:
    """The output projection of a model that says which it is."""
    try:
        return getattr(model, "get_output_embeddings", lambda: None)()
    except (AttributeError, NotImplementedError):
        return None


def _attention_width(config: "PretrainedConfig") -> int:
    """Heads x head width, the mean over layers where they differ; 0 where the configuration names no heads."""
    is_heterogeneous = getattr(config, "is_heterogeneous", False)
    widths = []
    for layer in config.per_layer_config if is_heterogeneous else [config]:
        num_heads = _field(layer, "num_attention_heads") or 0
        head_width = _field(layer, "head_dim") or (_field(layer, "hidden_size") or 0) // max(num_heads, 1)
        widths.append(num_heads * head_width)
    return sum(widths) // len(widths)
