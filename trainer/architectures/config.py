"""The configuration of a model of `transformers`, from settings and from what is known of the samples."""

import difflib
from typing import TYPE_CHECKING, Any

from sharding.ranks.errors import UserError
from trainer.architectures.faults import faults_of_a_configuration, reason
from trainer.architectures.images import check_images, fields_for_images
from trainer.architectures.late_imports import import_model_code
from trainer.architectures.padding import needs_padding, refuse_padding
from trainer.architectures.recordings import check_sampling_rate
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def build_model_config(model: ModelConfig, facts: SampleFacts) -> "PretrainedConfig":
    """The `transformers` configuration of the model that the run trains, on texts, images or recordings.

    Raises:
        UserError: the architecture or one of its fields is unknown, the vocabulary is smaller than the tokenizer's,
            the model has fewer positions than a sequence has tokens, it takes other images or sounds, or samples are
            none of these.
    """
    if model.architecture is None and model.pretrained is None:
        raise UserError(f"{model.name} is no model of transformers, which this is for; name a model.architecture.")
    if facts.vocab_size is None and facts.image_shape is None and facts.num_audio_samples is None:
        raise UserError(
            f"{model.name} is a model of transformers, but the samples are neither texts "
            "nor images nor recordings; choose model.builtin=mlp, say, or a task whose samples it takes."
        )
    import_model_code()
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
        config = _config_from_scratch(model, facts)
    config._attn_implementation = model.attention
    if facts.vocab_size is not None:
        text_config = config.get_text_config()
        if model.resize_vocabulary and (field(text_config, "vocab_size") or facts.vocab_size) < facts.vocab_size:
            text_config.vocab_size = facts.vocab_size
        _check_sizes(model, config, facts.vocab_size, facts.sequence_length or 0)
    if facts.image_shape is not None:
        check_images(model, config, facts.image_shape)
    if facts.sampling_rate is not None:
        check_sampling_rate(model, facts.sampling_rate)
    refuse_padding(model, config)
    return config


def _config_from_scratch(model: ModelConfig, facts: SampleFacts) -> "PretrainedConfig":
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
    values = _for_samples(facts, text_defaults) | given
    if model.vocab_multiple > 1 and isinstance(values.get("vocab_size"), int):
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


def _for_samples(facts: SampleFacts, defaults: "PretrainedConfig") -> dict[str, Any]:
    """Fields of a configuration that follow from what is read."""
    if facts.vocab_size is not None:
        return _for_tokens(facts, facts.vocab_size, defaults)
    return {} if facts.image_shape is None else fields_for_images(facts.image_shape, defaults)


def _for_tokens(facts: SampleFacts, vocab_size: int, defaults: "PretrainedConfig") -> dict[str, Any]:
    """Fields of a language model's configuration that follow from the tokenizer and the length of sequences."""
    # The class's own padding token is one of another tokenizer: here a word, whose embedding would stay zero.
    values: dict[str, Any] = {"vocab_size": vocab_size, "pad_token_id": None}
    if facts.eos_token_id is not None:
        values |= {"bos_token_id": facts.eos_token_id, "eos_token_id": facts.eos_token_id}
    if facts.mask_token_id is not None and facts.pad_token_id != facts.eos_token_id:
        # Tokenizers that mask have one that no text contains, from which some encoders count positions.
        values["pad_token_id"] = facts.pad_token_id
        # What marks the ends of a sequence there is not in packed ones, and its id would be beyond the vocabulary.
        values |= {name: facts.eos_token_id for name in ("cls_token_id", "sep_token_id") if field(defaults, name)}
    if field(defaults, "vocab_size_per_layer_input"):
        # A second table of embeddings, by the same ids.
        values["vocab_size_per_layer_input"] = facts.vocab_size
    positions = max_positions(defaults)
    if positions is not None and positions < (facts.sequence_length or 0):
        values["max_position_embeddings"] = facts.sequence_length
    return values


def _fill_in(config: "PretrainedConfig") -> None:
    """Give values to what some configurations leave open and their models then fail on."""
    num_heads, hidden_size = field(config, "num_attention_heads"), field(config, "hidden_size")
    if not num_heads or not hidden_size or getattr(config, "is_heterogeneous", False):
        return
    for name, value in (("num_key_value_heads", num_heads), ("head_dim", hidden_size // num_heads)):
        if name in vars(config) and field(config, name) is None:
            setattr(config, name, value)


def _has_field(config: "PretrainedConfig", name: str) -> bool:
    try:
        return hasattr(config, name)
    except (RuntimeError, NotImplementedError):
        return True


def field(config: "PretrainedConfig", name: str) -> Any:
    """A field of a configuration; None where it has none, or several, one for each layer."""
    try:
        return getattr(config, name, None)
    # Of transformers, for a field that differs between layers, and for some that an architecture must not have.
    except (RuntimeError, NotImplementedError):
        return None


def _check_sizes(model: ModelConfig, config: "PretrainedConfig", num_tokens: int, sequence_length: int) -> None:
    text_config = config.get_text_config()
    vocab_size = field(text_config, "vocab_size")
    if vocab_size is None or vocab_size < num_tokens:
        remedy = "set model.config.vocab_size to at least that, remove it"
        if model.pretrained is not None:
            remedy = "set model.resize_vocabulary=true to add those that it lacks"
        raise UserError(
            f"the model's vocab_size={vocab_size} is smaller than the tokenizer's {num_tokens} "
            f"tokens; {remedy}, or choose another tokenizer."
        )
    num_heads, num_pairs = field(text_config, "num_attention_heads"), field(text_config, "num_key_value_heads")
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
    positions = field(config.get_text_config(), "max_position_embeddings")
    # Some that have no limit say -1.
    return positions if isinstance(positions, int) and positions > 0 else None
