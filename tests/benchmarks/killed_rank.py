"""A benchmark's rank that is killed, for ``run_ranks``."""

import os
import signal

if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
signal.pause()
