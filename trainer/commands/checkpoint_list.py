"""``shardline checkpoint list RUN``: what a run has saved."""

import sys

from trainer.commands.arguments import Run
from trainer.commands.entry import entry


def checkpoint_list(run_folder: Run) -> int:
    """Show a run's checkpoints."""
    from rich.console import Console

    from trainer.checkpoint.inventory import checkpoints_of_run, show_checkpoints

    return show_checkpoints(checkpoints_of_run(run_folder), Console(soft_wrap=True))


main = entry(checkpoint_list)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
