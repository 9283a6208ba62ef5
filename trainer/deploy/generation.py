"""Text that a model continues, and turns that it answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sharding.ranks.errors import UserError
from trainer.architectures.config import max_positions
from trainer.data.chat_template import ChatTemplate
from trainer.data.tokenizer import text_encoder

_DEFAULT_NEW_TOKENS = 120


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: tokens to add at most; None for 120, or for as many as the model has positions for.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: choose among this many; 0 means all.
        chat: whether a prompt is what a user says, which is answered as the tokenizer's chat template puts it.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 50
    chat: bool = False


@dataclass(frozen=True)
class Continuation:
    """What a model has made of a prompt.

    Attributes:
        prompt: as it was given.
        seed: seed of the choice of tokens.
        text: the prompt and its continuation, or of a chat the answer alone.
        num_prompt_tokens: tokens that the model was given.
        num_new_tokens: tokens that it has added.
        has_ended: whether it came to an end by itself.
    """

    prompt: str
    seed: int
    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    has_ended: bool


def continue_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[str], sampling: Sampling, seeds: Sequence[int] = (0,)
) -> Iterator[Continuation]:
    """Continue each prompt with each seed, in this order.

    Each is computed by itself: in a padded batch rounding and draws would depend on what stands beside it.

    Args:
        model: a causal model of `transformers`, on the device that computes.
        tokenizer: its tokenizer.
        prompts: texts, all of them text, control tokens' names too; an empty one starts a new document.
        sampling: how tokens are chosen.
        seeds: of the choice of tokens.

    Raises:
        UserError: a prompt and its continuation are longer than the model has positions, the tokenizer has no chat
            template and one is asked for, or the model's scores are not finite.
    """
    encoder = _Encoder(tokenizer, chat=sampling.chat)
    encoded = [encoder.encode(prompt) for prompt in prompts]
    positions = max_positions(model.config)
    lengths = []
    for number, ids in enumerate(encoded, start=1):
        name = "--prompt" if len(prompts) == 1 else f"prompt {number} of {len(prompts)}"
        lengths.append(_num_new_tokens(name, len(ids), sampling.max_new_tokens, positions))
    # Whoever reads has an error before the first text, or all texts.
    return (
        _continued(model, tokenizer, encoder, prompt, ids, length, sampling, seed)
        for prompt, ids, length in zip(prompts, encoded, lengths, strict=True)
        for seed in seeds
    )


class _Encoder:
    """Token ids of prompts, and where an answer ends."""

    def __init__(self, tokenizer: Any, *, chat: bool) -> None:
        self.ends: list[int] = []
        self._template: ChatTemplate | None = None
        if not chat:
            # As in training: a control token's name in a text is text.
            self._encoder = text_encoder(tokenizer)
            self._start = tokenizer.eos_token_id
            return
        if not tokenizer.chat_template:
            raise UserError(
                "--chat: the tokenizer has no chat template, for the model was trained on texts; leave it out, or "
                "train on conversations with data.format=messages."
            )
        self._template = ChatTemplate(tokenizer, "--chat: the chat template")
        ends = {tokenizer.eos_token_id, self._template.end_of_turn_id}
        self.ends = sorted(token for token in ends if token is not None)

    def encode(self, prompt: str) -> list[int]:
        if self._template is not None:
            return self._template.prompt_ids([{"role": "user", "content": prompt}])
        ids: list[int] = self._encoder.encode(prompt, add_special_tokens=False).ids
        return ids or [self._start]


def _continued(
    model: Any,
    tokenizer: Any,
    encoder: _Encoder,
    prompt: str,
    encoded: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Continuation:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
    if encoder.ends:
        options["eos_token_id"] = encoder.ends
    ids = torch.tensor([encoded], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=[_check_finite],
        **options,
    )
    made: list[int] = output[0].tolist()
    new = made[len(encoded) :]
    shown = new if sampling.chat else made
    text: str = tokenizer.decode(shown, skip_special_tokens=True)
    return Continuation(
        prompt=prompt,
        seed=seed,
        text=text.strip() if sampling.chat else text,
        num_prompt_tokens=len(encoded),
        num_new_tokens=len(new),
        has_ended=bool(new) and new[-1] in (encoder.ends or _ends_of(model)),
    )


def _ends_of(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def _check_finite(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Refuse to choose among scores that are none; one of minus infinity is a token that is not to be drawn."""
    if torch.isnan(scores).any() or torch.isposinf(scores).any():
        raise UserError(
            f"the model's scores after {input_ids.shape[1]} tokens are not finite; give --dtype fp32 where it computes "
            "in another, or an earlier checkpoint by --step."
        )
    return scores


def _num_new_tokens(name: str, prompt_tokens: int, asked: int | None, positions: int | None) -> int:
    """How many tokens may be added; beyond its positions a model fails, or writes what it never learnt."""
    wanted = _DEFAULT_NEW_TOKENS if asked is None else asked
    if positions is None:
        return wanted
    left = positions - prompt_tokens
    if left < 1:
        raise UserError(
            f"{name} has {prompt_tokens} tokens and the model {positions} positions, which leaves none for a "
            "continuation; shorten it."
        )
    if asked is not None and asked > left:
        which = "a prompt" if name == "--prompt" else name
        raise UserError(
            f"--max-new-tokens {asked} and {which} of {prompt_tokens} tokens are {asked + prompt_tokens}, more than "
            f"the model's {positions} positions; ask for at most {left}."
        )
    return min(wanted, left)
