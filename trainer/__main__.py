"""Every rank's entry: ``python -m trainer CONFIG [key=value ...]`` under any launcher or by itself."""

import os
import sys

from sharding.ranks.process_lifetime import die_with_parent, is_started_by_launcher, stop_with_deepspeed

if __name__ == "__main__":
    # Before torch is imported, which takes seconds in which a launcher can be killed.
    if is_started_by_launcher(os.environ):
        die_with_parent()
        stop_with_deepspeed()
    num_restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if num_restarts and "SHARDLINE_ATTEMPT" not in os.environ:
        from trainer.faults.failure.agent_restarts import await_restart

        status = await_restart(sys.argv[1:], num_restarts)
        if status is not None:
            sys.exit(status)

    from trainer.rank import main

    main(sys.argv[1:])
