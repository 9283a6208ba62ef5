"""Whom to kill next, and when."""

import random
from dataclasses import dataclass

# Of the kills, those that come before the attempt has taken a step.
_AT_START_SHARE = 0.3
# Steps are short: within this time after one, anything may be going on.
_JITTER_S = 0.6


@dataclass(frozen=True)
class Plan:
    """A kill that is to come.

    Attributes:
        victim: ``rank-N``, ``launcher`` or ``agent``.
        num_steps: steps that the attempt is to take before; None for a kill while it starts.
        delay_s: seconds to wait then, or after the start.
    """

    victim: str
    num_steps: int | None
    delay_s: float


def plan_kill(seed: int, number: int, *, num_ranks: int, steps_left: int, kills_left: int, start_up_s: float) -> Plan:
    """Victim and moment of a kill, spread so that the run lasts until the last of them."""
    chance = random.Random(f"{seed} {number}")
    ranks = [f"rank-{rank}" for rank in range(num_ranks)]
    victim = chance.choice([*ranks, *ranks, "launcher", "agent"])
    if chance.random() < _AT_START_SHARE:
        return Plan(victim, None, chance.uniform(0.0, start_up_s))
    most = min(1.2 * steps_left / kills_left / (1.0 - _AT_START_SHARE), 0.9 * steps_left)
    return Plan(victim, round(chance.uniform(0.0, most)), chance.uniform(0.0, _JITTER_S))
