"""``shardline list``: the runs below a folder, and how they are."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.arguments import AsJson, expanded
from trainer.commands.entry import entry


def list_runs(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder that runs are in, or a run.", callback=expanded)
    ] = Path("runs"),
    as_json: AsJson = False,
) -> int:
    """List the runs in a folder, the latest first: state, step, best evaluation, when they changed, size."""
    from sharding.ranks.errors import EXIT_FINISHED
    from trainer.report.run_list import list_runs as find_runs
    from trainer.report.run_list import runs_text
    from trainer.runtime.json_output import print_json

    runs = find_runs(folder)
    if as_json:
        print_json({"runs": [run.values() for run in runs]})
    else:
        print(runs_text(runs, folder))
    return EXIT_FINISHED


main = entry(list_runs)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
