"""Every rank's entry: ``python -m trainer CONFIG [key=value ...]`` under torchrun, ``shardline run`` or by itself."""

from sharding.process_lifetime import die_with_parent

# Before torch is imported, which takes seconds in which a launcher can be killed.
die_with_parent()

import sys  # noqa: E402

from trainer.rank import main  # noqa: E402

if __name__ == "__main__":
    main(sys.argv[1:])
