"""``shardline report``: one run, or several compared, as a page for a browser."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.arguments import AsJson, expanded
from trainer.commands.entry import entry

_COMPARISON_NAME = "comparison.html"


def report(
    run_folders: Annotated[
        list[str], typer.Argument(help="Folders of runs, output_dir/name.", metavar="RUN [RUN ...]", callback=expanded)
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Page to write; RUN/report.html, or comparison.html for several runs.",
            callback=expanded,
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Write a run's page of plots for a browser, or one that compares several runs and begins with their ranking."""
    from sharding.ranks.errors import EXIT_FINISHED, UserError
    from trainer.report.end_of_run import write_run_goodput
    from trainer.report.page import write_report
    from trainer.report.ranking import rank_runs
    from trainer.run_folder.folder import RunFolder
    from trainer.runtime.json_output import print_json

    runs = [Path(run) for run in run_folders]
    target = to or (Path(_COMPARISON_NAME) if len(runs) > 1 else RunFolder(runs[0]).report_file)
    try:
        ranking = rank_runs(write_report(runs, target))
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}; choose another file with --to.") from error
    for run in runs:
        # Also where the run goes on: whoever writes it computes it from the same ledgers.
        write_run_goodput(RunFolder(run))
    if as_json:
        print_json({"page": target, **ranking.values()})
        return EXIT_FINISHED
    if len(runs) > 1:
        print(ranking.text(narrow=sys.stdout.isatty()))
    print(target)
    return EXIT_FINISHED


main = entry(report)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
