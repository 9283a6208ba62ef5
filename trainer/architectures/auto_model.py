"""A model of `transformers` with the head of a task, without weights."""

from typing import Any, Literal, get_args

import torch

from sharding.ranks.errors import UserError
from trainer.architectures.config import build_model_config
from trainer.architectures.padding import tell_padding
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts

HeadKind = Literal[
    "causal-lm",
    "masked-lm",
    "sequence-classification",
    "token-classification",
    "image-classification",
    "audio-classification",
]
"""Heads by the task that they are for."""

_EXAMPLES: dict[HeadKind, str] = {
    "causal-lm": "llama, gpt2, qwen3",
    "masked-lm": "bert, modernbert, roberta",
    "sequence-classification": "bert, modernbert, llama",
    "token-classification": "bert, modernbert, llama",
    "image-classification": "vit, convnext, resnet",
    "audio-classification": "wav2vec2, hubert",
}


def auto_model(kind: HeadKind, settings: ModelConfig, facts: SampleFacts, num_outputs: int | None = None) -> Any:
    """The model that `transformers` has for an architecture and a task, on torch's current default device.

    Args:
        kind: which head.
        settings: the section ``model``, with ``architecture`` or ``pretrained``.
        facts: of the samples; a head of as many classes as they have gets their names.
        num_outputs: predictions of a sample or a token; None for the vocabulary, where the head predicts tokens.

    Raises:
        UserError: see ``build_model_config`` and ``tell_padding``; also where the architecture has no such head.
    """
    import transformers

    config = build_model_config(settings, facts)
    # A configuration has it only where model.trust_remote_code says that its code may run.
    trusted = hasattr(config, "auto_map")
    name = kind.replace("-", "_").upper()
    if not trusted and type(config) not in getattr(transformers, f"MODEL_FOR_{name}_MAPPING"):
        raise _without_head(kind, settings, config)
    if num_outputs is not None:
        has_names = len(facts.classes) == num_outputs
        names = facts.classes if has_names else tuple(f"LABEL_{index}" for index in range(num_outputs))
        config.id2label = dict(enumerate(names))
        config.label2id = {label: index for index, label in enumerate(names)}
        if facts.vocab_size is not None:
            tell_padding(settings, config, facts)
    words = "CausalLM" if kind == "causal-lm" else "MaskedLM" if kind == "masked-lm" else None
    words = words or "".join(word.title() for word in kind.split("-"))
    made = getattr(transformers, f"AutoModelFor{words}")
    return made.from_config(config, dtype=torch.float32, trust_remote_code=trusted)


def _without_head(kind: HeadKind, settings: ModelConfig, config: Any) -> UserError:
    import transformers

    others = [
        other
        for other in get_args(HeadKind)
        if type(config) in getattr(transformers, f"MODEL_FOR_{other.replace('-', '_').upper()}_MAPPING")
    ]
    has = f"its heads are for {', '.join(others)}" if others else "it has none of ours"
    setting = "architecture" if settings.architecture is not None else "pretrained"
    return UserError(
        f"model.{setting}={getattr(settings, setting)} is a {config.model_type}, for which transformers has no head "
        f"for {kind} ({has}); choose another one ({_EXAMPLES[kind]}, say), or another task.name."
    )
