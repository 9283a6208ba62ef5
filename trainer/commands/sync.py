"""``shardline tracking sync``: the offline parts of all attempts become one wandb run."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.arguments import expanded
from trainer.commands.entry import entry


def sync(
    run_folders: Annotated[list[str], typer.Argument(help="Folders of runs.", metavar="RUN...", callback=expanded)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show parts and commands, and upload nothing.")] = False,
) -> int:
    """Join the offline parts of a run's attempts into its one wandb run."""
    from rich.console import Console

    from sharding.ranks.errors import EXIT_FINISHED
    from trainer.trackers.wandb_sync import sync_run

    for run_folder in run_folders:
        sync_run(Path(run_folder), Console(soft_wrap=True), dry_run=dry_run)
    return EXIT_FINISHED


main = entry(sync)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
