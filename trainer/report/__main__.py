"""``shardline report``: one run, or several compared, as a page for a browser.

``python -m trainer.report RUN [RUN ...] [--to FILE]``
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sharding.ranks.errors import EXIT_BAD_INPUT, EXIT_FINISHED, UserError
from trainer.report.end_of_run import write_run_goodput
from trainer.report.page import write_report
from trainer.run_folder.folder import RunFolder

_COMPARISON_NAME = "comparison.html"


def main(arguments: Sequence[str]) -> int:
    """Write the report and name it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="shardline report")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--to", metavar="FILE")
    options = parser.parse_args(arguments)
    runs = [Path(run) for run in options.runs]
    target = Path(options.to or (_COMPARISON_NAME if len(runs) > 1 else RunFolder(runs[0]).report_file))
    try:
        write_report(runs, target)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        print(f"error: {target} cannot be written: {error.strerror}; choose another file with --to.", file=sys.stderr)
        return EXIT_BAD_INPUT
    for run in runs:
        # Also where the run goes on: whoever writes it computes it from the same ledgers.
        write_run_goodput(RunFolder(run))
    print(target)
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
