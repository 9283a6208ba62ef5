"""``shardline generate``: continue a text with a run's model."""

import sys
from typing import Annotated

import typer

from trainer.commands.arguments import Average, OwnTask, RemoteCode, Step, expanded
from trainer.commands.entry import entry


def generate(
    run_folder: Annotated[
        str, typer.Argument(help="Folder of a run or of an exported model.", metavar="RUN", callback=expanded)
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue, or with --chat what a user says.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Have the prompt answered, as the tokenizer's chat template puts it.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to add at most; 120, or what the model's positions leave.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among this many likeliest tokens; 0 means all.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the choice.")] = 0,
    step: Step = None,
    ema: Average = False,
    task: OwnTask = None,
    trust_remote_code: RemoteCode = False,
) -> int:
    """Continue a text, or answer a question, with a run's model."""
    from sharding.ranks.errors import EXIT_FINISHED
    from trainer.deploy.allowed_code import AllowedCode
    from trainer.deploy.generation import answer, generate_text, load_model

    model, tokenizer = load_model(run_folder, step, averaged=ema, allowed=AllowedCode(task, trust_remote_code))
    text = (answer if chat else generate_text)(
        model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    print(text)
    return EXIT_FINISHED


main = entry(generate)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
