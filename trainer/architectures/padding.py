"""The padding token of a model, which packed sequences do without."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sharding.ranks.errors import UserError
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts

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


def tell_padding(model: ModelConfig, model_config: "PretrainedConfig", facts: SampleFacts) -> None:
    """Let a model that reads texts of several lengths know what fills up the shorter ones.

    Decoders look for the last token before it, whatever the attention mask says. Where neither model nor tokenizer has
    such a token, that is the end of text, which no text contains.

    Raises:
        UserError: the tokenizer fills up with another token.
    """
    config = model_config.get_text_config()
    padding = getattr(config, "pad_token_id", None)
    if padding is None or padding < 0:
        config.pad_token_id = next(i for i in (facts.pad_token_id, facts.eos_token_id, 0) if i is not None)
    elif facts.pad_token_id not in (None, padding):
        where, remedy = (
            (f"model.pretrained={model.pretrained} has", "let its config.json and its tokenizer name the same one")
            if model.pretrained
            else ("model.config has", "remove it")
        )
        raise UserError(
            f"{where} pad_token_id={padding}, but the tokenizer fills up shorter texts with {facts.pad_token_id}, "
            f"which the model would read as text; {remedy}."
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
