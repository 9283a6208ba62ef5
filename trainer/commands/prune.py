"""``shardline prune``: a checkpoint with its least weights at zero, as a run of its own."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.arguments import OwnFactories, OwnTask, RemoteCode, Run, Step, expanded
from trainer.commands.entry import entry


def prune(
    run_folder: Run,
    to: Annotated[Path, typer.Option(metavar="RUN2", help="Folder of the new run.", callback=expanded)],
    sparsity: Annotated[float, typer.Option(help="Share of the weights that is pruned.")] = 0.5,
    by: Annotated[str, typer.Option(help="magnitude, gradient, importance or random.")] = "magnitude",
    pattern: Annotated[str, typer.Option(help="unstructured or 2:4.")] = "unstructured",
    scope: Annotated[str, typer.Option(help="global or layer.")] = "global",
    parameters: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Prune the parameters of such names, several if given several times."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave the parameters of such names as they are.")
    ] = None,
    step: Step = None,
    task: OwnTask = None,
    factory: OwnFactories = None,
    trust_remote_code: RemoteCode = False,
) -> int:
    """Set the least weights of a checkpoint to zero, and write it as a run of its own; the run stays as it is.

    The new run can be evaluated, exported and trained on (shardline run RUN2/config.yaml steps=...): zeros stay zero.
    """
    from sharding.ranks.errors import EXIT_FINISHED
    from trainer.checkpoint.reader import open_checkpoint
    from trainer.deploy.allowed_code import AllowedCode
    from trainer.deploy.prune_run import prune_run
    from trainer.runtime.text_table import text_table

    settings = {"sparsity": sparsity, "by": by, "pattern": pattern, "scope": scope}
    names = {"parameters": parameters or [], "exclude": exclude or []}
    allowed = AllowedCode(task, trust_remote_code, tuple(factory or ()))
    reader = open_checkpoint(run_folder, step)
    found = prune_run(reader, run_folder, to, settings | names, allowed, sys.argv)
    rows = [[one.name, f"{one.num_weights:,}", f"{one.num_kept / one.num_weights:.1%}"] for one in found]
    print(text_table([["parameter", "weights", "kept"], *rows], right=(1, 2)))
    num_weights = sum(one.num_weights for one in found)
    num_pruned = num_weights - sum(one.num_kept for one in found)
    print(f"pruned {num_pruned:,} of {num_weights:,} weights of step {reader.manifest.training.step}: {to}")
    return EXIT_FINISHED


main = entry(prune)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
