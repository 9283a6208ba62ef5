"""``shardline checkpoint list RUN``: what a run has saved."""

import sys

from trainer.commands.arguments import AsJson, Run
from trainer.commands.entry import entry


def checkpoint_list(run_folder: Run, as_json: AsJson = False) -> int:
    """Show a run's checkpoints; exit status 2 if one is corrupt."""
    from sharding.ranks.errors import EXIT_BAD_INPUT, EXIT_FINISHED
    from trainer.checkpoint.inventory import checkpoints_of_run, take_inventory
    from trainer.runtime.json_output import output_aside, print_json

    with output_aside(as_json):
        inventory = take_inventory(checkpoints_of_run(run_folder))
    if as_json:
        print_json(inventory.values())
    else:
        print(inventory.text())
    return EXIT_BAD_INPUT if inventory.corrupt else EXIT_FINISHED


main = entry(checkpoint_list)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
