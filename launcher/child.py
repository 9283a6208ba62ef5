"""``python -m launcher.child COMMAND ...`` becomes the command, but ends with its parent."""

import os
import sys

from sharding.process_lifetime import die_with_parent

if __name__ == "__main__":
    # Done here and not between fork and exec in the parent, which has threads by then. The setting survives exec.
    die_with_parent()
    os.execvp(sys.argv[1], sys.argv[1:])
