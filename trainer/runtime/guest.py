"""A run in a process that is not its own, such as a script or a notebook, which finds itself as it was afterwards."""

import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sharding.ranks.errors import UserError
from trainer.runtime.stopping import stop_signals


@contextmanager
def as_guest() -> Iterator[None]:
    """Put back what a run changes of its process: signals, output, log, threads, kernels.

    Random generators are left as the run's last step has them.

    Raises:
        UserError: this is not the process's main thread, which alone hears of signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UserError(
            f"a run was begun in the thread {threading.current_thread().name}, where no signal could stop it; begin it "
            "in the main thread of the process."
        )
    handlers = {number: signal.getsignal(number) for number in stop_signals()}
    logger = logging.getLogger("shardline")
    log_handlers, level = list(logger.handlers), logger.level
    num_threads = torch.get_num_threads()
    is_deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    outputs = {number: os.dup(number) for number in (1, 2)}
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in outputs.items():
            os.dup2(copy, number)
            os.close(copy)
        torch.use_deterministic_algorithms(is_deterministic)
        torch.backends.cudnn.benchmark = benchmark
        torch.set_num_threads(num_threads)
        for handler in [handler for handler in logger.handlers if handler not in log_handlers]:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)
        for number, before in handlers.items():
            # None stands for one that Python has not set, and so cannot set again.
            if before is not None:
                signal.signal(number, before)
        # A model in a circle of references would be there beside the next one.
        gc.collect()
