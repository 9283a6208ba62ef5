"""``shardline checkpoint verify RUN``: whether what a run has saved is complete."""

import sys

from trainer.commands.arguments import Run
from trainer.commands.entry import entry


def checkpoint_verify(run_folder: Run) -> int:
    """Compare every file of a run's checkpoints with its manifest; exit status 2 if one is corrupt."""
    from rich.console import Console

    from trainer.checkpoint.inventory import checkpoints_of_run, verify_checkpoints

    return verify_checkpoints(checkpoints_of_run(run_folder), Console(soft_wrap=True))


main = entry(checkpoint_verify)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
