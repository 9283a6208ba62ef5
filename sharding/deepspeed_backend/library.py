"""DeepSpeed itself: imported without its chatter, and its division of blocks."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from sharding.deepspeed_backend.files import check_file_access, keeps_files, size_buffers


class BlockPartitioner:
    """Divides blocks over all ranks as ZeRO-3 wants them."""

    def __init__(self, settings: dict[str, Any], model: nn.Module, num_ranks: int) -> None:
        """Bind to DeepSpeed's configuration.

        Raises:
            UserError: a setting needs what this machine lacks.
        """
        self._settings = settings
        self._deepspeed = import_deepspeed(settings)
        self._swapper: Any = None
        size_buffers(settings, model, num_ranks)

    def partition(self, block: nn.Module) -> None:
        """Divide a block's parameters in place; frees what this rank does not keep."""
        # The configuration's type is fp32, since one that is given here is ignored on a CPU in favour of bf16.
        with linear_of_torch():
            context = self._deepspeed.zero.Init(
                module=block, config_dict_or_path=self._settings, param_swapper=self._swapper
            )
        # Each swapper empties the folder of the parameters' files when it is made: one for all blocks.
        self._swapper = context.param_swapper


@contextmanager
def linear_of_torch() -> Iterator[None]:
    """Take back what DeepSpeed's stage 3 does to the linear layers of the whole process, which it does for good."""
    linear = functional.linear
    try:
        yield
    finally:
        functional.linear = linear


@contextmanager
def linear_of_deepspeed() -> Iterator[None]:
    """Have linear layers keep no gathered weights from forward to backward."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    with linear_of_torch():
        functional.linear = zero3_linear_wrap
        yield


def import_deepspeed(settings: dict[str, Any]) -> Any:
    """DeepSpeed without its chatter, and without an extension for inference that it would compile first.

    Raises:
        UserError: a setting needs what this machine lacks.
    """
    # It warns where it has to find out by itself that there is no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from deepspeed.utils import logger

    # Its log speaks of every setting on every rank, and warns of each optimizer that is not its own.
    logger.setLevel(logging.ERROR)
    # It calls collectives by names that newer torch deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # Built when communication starts on a CPU, used by inference alone; a build that was killed leaves a lock on which
    # every later run would wait.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Until it knows of the process group, it takes itself for one rank.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    if keeps_files(settings):
        check_file_access()
    return deepspeed
