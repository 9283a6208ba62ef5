"""``shardline checkpoint verify RUN``: whether what a run has saved is complete."""

import sys
from dataclasses import asdict

from trainer.commands.arguments import AsJson, Run
from trainer.commands.entry import entry


def checkpoint_verify(run_folder: Run, as_json: AsJson = False) -> int:
    """Compare every file of a run's checkpoints with its manifest; exit status 2 if one is corrupt."""
    from sharding.ranks.errors import EXIT_BAD_INPUT, EXIT_FINISHED
    from trainer.checkpoint.inventory import checkpoints_of_run, verify_checkpoints
    from trainer.runtime.json_output import output_aside, print_json

    found = []
    with output_aside(as_json):
        for one in verify_checkpoints(checkpoints_of_run(run_folder)):
            found.append(one)
            if not as_json:
                # Each takes its time.
                print(one.line(), flush=True)
    if as_json:
        print_json({"checkpoints": [asdict(one) for one in found]})
    return EXIT_BAD_INPUT if any(one.status == "corrupt" for one in found) else EXIT_FINISHED


main = entry(checkpoint_verify)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
