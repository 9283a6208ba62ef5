"""``shardline generate``: continue texts with a run's model."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from trainer.commands.arguments import AsJson, Average, OwnFactories, OwnTask, RemoteCode, Step, expanded
from trainer.commands.entry import entry


def generate(
    run_folder: Annotated[
        str, typer.Argument(help="Folder of a run or of an exported model.", metavar="RUN", callback=expanded)
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Text to continue, or with --chat what a user says; may be repeated."),
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="One prompt a line; in a .jsonl file a string, or an object with prompt; - is standard input.",
            callback=expanded,
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Have prompts answered, as the tokenizer's chat template puts them.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to add at most; 120, or what the model's positions leave.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among this many likeliest tokens; 0 means all.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the choice.")] = 0,
    num_samples: Annotated[int, typer.Option(min=1, help="Texts of each prompt: with --seed, and those after it.")] = 1,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes a GPU where there is one.")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(help="Of the weights; auto: fp32 of a run, and what a folder has."),
    ] = "auto",
    as_json: AsJson = False,
    step: Step = None,
    ema: Average = False,
    task: OwnTask = None,
    factory: OwnFactories = None,
    trust_remote_code: RemoteCode = False,
) -> int:
    """Continue texts, or answer questions, with a run's model."""
    from dataclasses import asdict

    from sharding.ranks.errors import EXIT_FINISHED, UserError
    from trainer.deploy.allowed_code import AllowedCode
    from trainer.deploy.generation import Sampling, continue_prompts
    from trainer.deploy.loaded import load_model
    from trainer.runtime.json_output import output_aside, print_json

    texts = [*(prompt or ()), *(() if prompt_file is None else read_prompts(prompt_file))]
    if not texts:
        empty = "" if prompt_file is None else f"--prompt-file {prompt_file} has no line; "
        raise UserError(f"{empty}give --prompt TEXT, or --prompt-file FILE with one prompt a line.")
    allowed = AllowedCode(task, trust_remote_code, tuple(factory or ()))
    sampling = Sampling(max_new_tokens, temperature, top_k, chat)
    with output_aside(as_json):
        model, tokenizer = load_model(run_folder, step, averaged=ema, allowed=allowed, device=device, dtype=dtype)
        made = continue_prompts(model, tokenizer, texts, sampling, range(seed, seed + num_samples))
        document = {"run": run_folder, "continuations": [asdict(one) for one in made]} if as_json else None
    if document is not None:
        print_json(document)
        return EXIT_FINISHED
    num_texts = len(texts) * num_samples
    for index, one in enumerate(made):
        if num_texts > 1:
            print(f"{'' if not index else chr(10)}== prompt {index // num_samples + 1}, seed {one.seed}")
        print(one.text, flush=True)
    return EXIT_FINISHED


def read_prompts(file: str) -> list[str]:
    """The prompts in a file, or of standard input where its name is ``-``.

    Raises:
        UserError: it cannot be read, or a line is no prompt.
    """
    from sharding.ranks.errors import UserError

    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--prompt-file {file} cannot be read: {error.strerror}; name a file with one prompt a line."
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt-file {file} is no text in UTF-8; name a file with one prompt a line.") from None
    lines = text.removesuffix("\n").split("\n") if text else []
    if not file.endswith(".jsonl"):
        return lines
    return [_prompt_of(line, f"--prompt-file {file}, line {number}") for number, line in enumerate(lines, start=1)]


def _prompt_of(line: str, place: str) -> str:
    from sharding.ranks.errors import UserError

    try:
        value = json.loads(line)
    except ValueError:
        raise UserError(f"{place} is no JSON; write a string, or an object with prompt.") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise UserError(f"{place} has no prompt; write a string, or an object with prompt.")
    return prompt


main = entry(generate)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
