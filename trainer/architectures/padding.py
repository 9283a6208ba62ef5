"""The padding token of a model, which packed sequences do without."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sharding.ranks.errors import UserError
from trainer.config.sections import ModelConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def refuse_padding(model: ModelConfig, model_config: "PretrainedConfig") -> None:
    """Refuse a padding token that the vocabulary does not have.

    Raises:
        UserError: its id is beyond the vocabulary.
    """
    for part in parts_of(model_config):
        padding, size = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(padding, int) and isinstance(size, int) and not -1 <= padding < size:
            where = f"model.pretrained={model.pretrained} has" if model.pretrained else "model.config has"
            raise UserError(
                f"{where} pad_token_id={padding}, which is none of its vocab_size={size} tokens; set it to null or to "
                "a token that no text contains."
            )


def needs_padding(name: str) -> UserError:
    """What to say of a model that cannot be without a padding token."""
    return UserError(
        f"{name} cannot be without a padding token, but pad_token_id=null, for the tokenizer has none; set "
        "model.config.pad_token_id to a token that no text contains, or choose another architecture (llama, gpt2, say)."
    )


def parts_of(model_config: "PretrainedConfig") -> Iterator[Any]:
    """A configuration and those that it is made of."""
    yield model_config
    for name in getattr(model_config, "sub_configs", {}):
        part = getattr(model_config, name, None)
        if part is not None:
            yield from parts_of(part)
