"""``shardline generate``: continue a text with a run's model.

``python -m trainer.generate RUN --prompt TEXT [...]``; RUN is a run's folder or an exported model.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sharding.errors import EXIT_FINISHED, UserError, ends_with_a_sentence
from trainer.data.tokenizer import text_encoder
from trainer.export import export_model
from trainer.run_arguments import open_checkpoint


def load_model(run: str, step: int | None, *, averaged: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer of a run's checkpoint or of an exported folder, in evaluation mode.

    Args:
        run: the folder.
        step: step of the run's checkpoint; the newest if None.
        averaged: whether to take the moving average of the run's weights.

    Raises:
        UserError: there is neither a run nor a model in the folder, or no average.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if (Path(run) / "model.safetensors").exists() or (Path(run) / "model.safetensors.index.json").exists():
        if averaged:
            raise UserError(f"--ema: {run} is an exported model, which has one set of weights; name the run's folder.")
        tokenizer = AutoTokenizer.from_pretrained(run, trust_remote_code=False)
        return AutoModelForCausalLM.from_pretrained(run, trust_remote_code=False).eval(), tokenizer
    reader = open_checkpoint(run, step)
    # By way of the exported form, so that what is shown here is what is served elsewhere.
    with tempfile.TemporaryDirectory(prefix="shardline-generate-") as folder:
        export_model(reader, Path(folder) / "model", averaged=averaged)
        return load_model(str(Path(folder) / "model"), None)


def generate_text(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int, temperature: float, top_k: int, seed: int
) -> str:
    """The prompt and its continuation.

    Args:
        model: a causal model of `transformers`.
        tokenizer: its tokenizer.
        prompt: text to continue, all of it text, control tokens' names too; empty starts a new document.
        max_new_tokens: tokens to add at most.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: choose among this many; 0 means all.
        seed: seed of the choice.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    # As in training: a control token's name in a text is text.
    encoded = text_encoder(tokenizer).encode(prompt, add_special_tokens=False).ids
    ids = torch.tensor([encoded or [tokenizer.eos_token_id]])
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    ids = ids.to(device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Generate and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="shardline generate")
    parser.add_argument("run")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=120)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int)
    parser.add_argument("--ema", action="store_true")
    options = parser.parse_args(arguments)
    model, tokenizer = load_model(options.run, options.step, averaged=options.ema)
    text = generate_text(
        model,
        tokenizer,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )
    print(text)
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
