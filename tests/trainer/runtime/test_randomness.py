"""Generators as functions of seed, step and rank."""

import random

import numpy as np
import torch

from trainer.runtime.randomness import seed_step


def _draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_draws_depend_on_seed_step_and_rank_alone() -> None:
    found = {}
    for key in [(1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 1)]:
        seed_step(*key)
        found[key] = _draws()
    assert all(len({draws[index] for draws in found.values()}) == 4 for index in range(3))
    seed_step(1, 1, 0)
    assert _draws() == found[1, 1, 0]


def test_seeding_a_step_leaves_nothing_behind() -> None:
    """torch.manual_seed keeps a stack trace per call for an accelerator that is not in use."""
    before = len(torch.cuda._queued_calls)
    for step in range(10):
        seed_step(1, step, 0)
    assert len(torch.cuda._queued_calls) == before
