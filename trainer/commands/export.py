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
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a run with LoRA: its adapters alone, which peft loads.")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a run with LoRA: the whole model, adapters added to the weights.")
    ] = False,
    task: OwnTask = None,
    trust_remote_code: RemoteCode = False,
) -> int:
    """Write a checkpoint as a model and tokenizer that transformers loads."""
    from sharding.ranks.errors import EXIT_FINISHED, UserError
    from trainer.checkpoint.reader import open_checkpoint
    from trainer.deploy.allowed_code import AllowedCode
    from trainer.deploy.export import Form, export_model

    if adapter and merge:
        raise UserError("--adapter and --merge name two forms of an export; leave one out.")
    reader = open_checkpoint(run_folder, step)
    form: Form | None = "adapter" if adapter else "merged" if merge else None
    export_model(reader, to, averaged=ema, allowed=AllowedCode(task, trust_remote_code), form=form)
    part = "the adapters of " if adapter else ""
    average = "the averaged weights of " if ema else ""
    print(f"exported {part}{average}step {reader.manifest.training.step} of {run_folder} to {to}")
    source = reader.manifest.config["checkpoint"].get("from")
    if adapter and source is not None:
        print(f"they stand beside the model of {source}: export that, and give it to PeftModel.from_pretrained")
    return EXIT_FINISHED


main = entry(export)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
