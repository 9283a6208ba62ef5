"""``shardline export``: a checkpoint as a folder that `transformers` loads."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.arguments import Average, OwnTask, RemoteCode, Run, Step, expanded
from trainer.commands.entry import entry


def export(
    run_folder: Run,
    to: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the model.", callback=expanded)],
    step: Step = None,
    ema: Average = False,
    task: OwnTask = None,
    trust_remote_code: RemoteCode = False,
) -> int:
    """Write a checkpoint as a model and tokenizer that transformers loads."""
    from sharding.ranks.errors import EXIT_FINISHED
    from trainer.checkpoint.reader import open_checkpoint
    from trainer.deploy.allowed_code import AllowedCode
    from trainer.deploy.export import export_model

    reader = open_checkpoint(run_folder, step)
    export_model(reader, to, averaged=ema, allowed=AllowedCode(task, trust_remote_code))
    average = "the averaged weights of " if ema else ""
    print(f"exported {average}step {reader.manifest.training.step} of {run_folder} to {to}")
    return EXIT_FINISHED


main = entry(export)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
