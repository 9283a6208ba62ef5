"""After a failed step of a Slurm job: ``python -m launcher.slurm.restart NUM_RESTARTS CONFIG [key=value ...]``.

``slurm/job.sh`` runs it on the first node where ``faults.max_restarts`` is set. It waits out the back-off and ends with
0 where the step is to be started again, at a port that it prints, else with the exit status of the job.
"""

import contextlib
import os
import sys
from collections.abc import Sequence

from launcher.restarts import Restarts
from launcher.slurm.job import print_variables
from launcher.slurm.port import meeting_port
from launcher.stop_signals import StopSignals
from sharding.ranks.errors import EXIT_FAILED, ends_with_a_sentence
from trainer.config import load_config
from trainer.run_folder.folder import RunFolder


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Decide and wait; returns the exit status."""
    num_restarts, config_path, *overrides = arguments
    config = load_config(config_path, overrides)
    run_folder = RunFolder.of(config)
    restarts = Restarts(config.faults, run_folder, int(num_restarts))
    # Standard output is the batch script's to read.
    with contextlib.redirect_stdout(sys.stderr), StopSignals() as signals:
        status = restarts.after(run_folder.newest_attempt(), EXIT_FAILED, signals)
    if status is not None:
        return status
    print_variables({"MASTER_PORT": str(meeting_port(config, os.environ))})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
