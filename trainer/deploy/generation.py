"""Text that a run's model, or an exported one, continues."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sharding.ranks.errors import UserError
from trainer.architectures.config import max_positions
from trainer.checkpoint.reader import open_checkpoint
from trainer.data.chat_template import ChatTemplate
from trainer.data.tokenizer import text_encoder
from trainer.deploy.allowed_code import AllowedCode
from trainer.deploy.export import Form, export_model
from trainer.model.lora import adapted_layers

_NO_CODE = AllowedCode()
_DEFAULT_NEW_TOKENS = 120


def load_model(
    run: str, step: int | None, *, averaged: bool = False, allowed: AllowedCode = _NO_CODE
) -> tuple[Any, Any]:
    """Model and tokenizer of a run's checkpoint or of an exported folder, in evaluation mode.

    Args:
        run: the folder.
        step: step of the run's checkpoint; the newest if None.
        averaged: whether to take the moving average of the run's weights.
        allowed: the Python code that may run for it.

    Raises:
        UserError: there is neither a run nor a whole model in the folder, no average, or code that is not allowed; or
            the model is not made to continue text.
    """
    if (Path(run) / "model.safetensors").exists() or (Path(run) / "model.safetensors.index.json").exists():
        if averaged:
            raise UserError(f"--ema: {run} is an exported model, which has one set of weights; name the run's folder.")
        return _load_exported(run, run, trust_remote_code=allowed.trust_remote_code)
    reader = open_checkpoint(run, step)
    form: Form | None = "merged" if adapted_layers(reader.parameter_names()) else None
    # By way of the exported form, so that what is shown here is what is served elsewhere.
    with tempfile.TemporaryDirectory(prefix="shardline-generate-") as folder:
        export_model(reader, Path(folder) / "model", averaged=averaged, allowed=allowed, form=form)
        return _load_exported(str(Path(folder) / "model"), run, trust_remote_code=allowed.trust_remote_code)


def _load_exported(folder: str, name: str, *, trust_remote_code: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        if "trust_remote_code" in str(error):
            reason = "it needs Python code of its own; read that, and give --trust-remote-code to run it"
        raise UserError(f"{name} cannot be loaded as a model that continues text: {reason}.") from None
    kinds = getattr(model.config, "architectures", None) or [type(model).__name__]
    if type(model).__name__ not in kinds:
        raise UserError(f"{name} holds a {kinds[0]}, which does not continue text; name a causal language model.")
    # Without a word, transformers would draw the ones anew and leave the others out.
    for fault, keys in sorted(report.items()):
        if keys:
            first = next(iter(keys))
            raise UserError(
                f"{name} is not a whole {kinds[0]}: {len(keys)} {fault.replace('_', ' ')}, the first being "
                f"{first if isinstance(first, str) else first[0]}; export it once more."
            )
    return model.eval(), tokenizer


def generate_text(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int | None, temperature: float, top_k: int, seed: int
) -> str:
    """The prompt and its continuation.

    Args:
        model: a causal model of `transformers`.
        tokenizer: its tokenizer.
        prompt: text to continue, all of it text, control tokens' names too; empty starts a new document.
        max_new_tokens: tokens to add at most; None for 120, or for as many as the model has positions for.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: choose among this many; 0 means all.
        seed: seed of the choice.

    Raises:
        UserError: prompt and continuation are longer than the model has positions.
    """
    # As in training: a control token's name in a text is text.
    encoded = text_encoder(tokenizer).encode(prompt, add_special_tokens=False).ids
    options = _Sampling(max_new_tokens, temperature, top_k, seed)
    ids, _ = _continued(model, tokenizer, encoded or [tokenizer.eos_token_id], options, set())
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


def answer(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int | None, temperature: float, top_k: int, seed: int
) -> str:
    """What the assistant says to one turn of a user, as the tokenizer's chat template puts it, up to the turn's end.

    Args:
        model: a causal model of `transformers`.
        tokenizer: its tokenizer, with a chat template.
        prompt: what the user says.
        max_new_tokens: see ``generate_text``.
        temperature: see ``generate_text``.
        top_k: see ``generate_text``.
        seed: see ``generate_text``.

    Raises:
        UserError: the tokenizer has no chat template, or see ``generate_text``.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "--chat: the tokenizer has no chat template, for the model was trained on texts; leave it out, or train on "
            "conversations with data.format=messages."
        )
    template = ChatTemplate(tokenizer, "--chat: the chat template")
    encoded = template.prompt_ids([{"role": "user", "content": prompt}])
    ends = {token for token in (tokenizer.eos_token_id, template.end_of_turn_id) if token is not None}
    options = _Sampling(max_new_tokens, temperature, top_k, seed)
    ids, num_prompt_tokens = _continued(model, tokenizer, encoded, options, ends)
    text: str = tokenizer.decode(ids[num_prompt_tokens:], skip_special_tokens=True)
    return text.strip()


@dataclass(frozen=True)
class _Sampling:
    """How tokens are chosen; see ``generate_text``."""

    max_new_tokens: int | None
    temperature: float
    top_k: int
    seed: int


def _continued(
    model: Any, tokenizer: Any, encoded: list[int], options: _Sampling, ends: set[int]
) -> tuple[list[int], int]:
    """Token ids with their continuation up to an end, and how many were there before."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    ids = torch.tensor([encoded])
    max_new_tokens = _num_new_tokens(ids.shape[1], options.max_new_tokens, max_positions(model.config))
    torch.manual_seed(options.seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k}
    if ends:
        sampling["eos_token_id"] = sorted(ends)
    ids = ids.to(device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    return output[0].tolist(), ids.shape[1]


def _num_new_tokens(prompt_tokens: int, asked: int | None, positions: int | None) -> int:
    """How many tokens may be added; beyond its positions a model fails, or writes what it never learnt."""
    wanted = _DEFAULT_NEW_TOKENS if asked is None else asked
    if positions is None:
        return wanted
    left = positions - prompt_tokens
    if left < 1:
        raise UserError(
            f"--prompt has {prompt_tokens} tokens and the model {positions} positions, which leaves none for a "
            "continuation; shorten it."
        )
    if asked is not None and asked > left:
        raise UserError(
            f"--max-new-tokens {asked} and a prompt of {prompt_tokens} tokens are {asked + prompt_tokens}, more than "
            f"the model's {positions} positions; ask for at most {left}."
        )
    return min(wanted, left)
