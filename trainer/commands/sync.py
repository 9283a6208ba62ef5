"""``shardline tracking sync RUN [RUN ...] [--dry-run]``: the offline parts of all attempts become one wandb run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sharding.ranks.errors import EXIT_FINISHED, ends_with_a_sentence
from trainer.trackers.wandb_sync import sync_run


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Upload one run or several; returns the exit status."""
    parser = argparse.ArgumentParser(prog="shardline tracking sync")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    for run_dir in options.runs:
        sync_run(run_dir, Console(soft_wrap=True), dry_run=options.dry_run)
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
