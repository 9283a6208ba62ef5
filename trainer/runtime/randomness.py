"""Random generators as functions of (seed, step, rank) or (seed, sample): nothing to save, nothing to lose."""

import hashlib
import random
from typing import Any

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed Python's, NumPy's and torch's generators for one step of one rank.

    Dropout masks therefore are the same in a continued run as in one that was never interrupted, however often it was
    continued, and differ between ranks.
    """
    _seed_generators(f"{seed}:{step}:{rank}")


def seed_sample(seed: int, position: int) -> None:
    """Seed all generators for one sample of an evaluation, by its position in the split."""
    _seed_generators(f"{seed}:evaluation:{position}")


def generator_states() -> tuple[Any, ...]:
    """States of all generators on this rank, equal to earlier ones where nothing was drawn in between."""
    numpy_state: Any = np.random.get_state()
    states = [torch.default_generator.get_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.default_generators[torch.cuda.current_device()].get_state())
    return random.getstate(), bytes(numpy_state[1]), numpy_state[2:], *(bytes(state.numpy()) for state in states)


def _seed_generators(key: str) -> None:
    digest = hashlib.sha256(key.encode()).digest()
    value = int.from_bytes(digest[:8], "little") >> 1
    # torch.manual_seed asks every kind of accelerator, and where CUDA is not in use it keeps a stack trace per call:
    # that costs more than the rest of this function, and memory that grows with the steps.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)


def use_deterministic_kernels() -> None:
    """Make torch refuse kernels whose results can differ between two runs; must precede the first CUDA call."""
    import os

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
