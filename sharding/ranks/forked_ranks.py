"""How Python itself starts ranks on one machine, for checks that need many short-lived groups of them."""

import multiprocessing
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext, SpawnContext

import torch

PRELOADED = ("trainer.build", "transformers.models.llama.modeling_llama", "deepspeed", "accelerate")
"""What most ranks import."""


def rank_context(preloaded: Sequence[str] = PRELOADED) -> ForkServerContext | SpawnContext:
    """What makes rank processes; one that has imported everything is forked for each, where there is no GPU.

    Importing it all takes longer than most checks. That process runs nothing else, so that no lock of another thread is
    copied; it has the environment of the time when it was started. CUDA does not work in a process that was forked
    after a library has so much as counted the GPUs, so that there each rank is a new process.

    Args:
        preloaded: modules that it imports; what is not installed is left out.
    """
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preloaded))
    return context
