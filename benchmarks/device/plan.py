"""Which parts there are, in which order, and how long each may take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.device.job import Emit, Job
from benchmarks.device.machine import measure_machine
from benchmarks.device.speed import climb, profile_best
from benchmarks.device.truth import (
    check_deterministic,
    check_formats,
    check_graphs,
    check_lstm,
    check_parity,
    check_resume,
    prepare_text,
)

FULL_DEADLINE_S = 540.0


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: of its rows.
        run: what it does, in a process of its own.
        ends_by_s: seconds after the start of the command by which it is ended, when the deadline is
            ``FULL_DEADLINE_S``; other deadlines stretch it.
        least_s: it is not begun with less time than this left.
        options: see Job.
    """

    name: str
    run: Callable[[Job, Emit], None]
    ends_by_s: float
    least_s: float
    options: dict[str, Any] = field(default_factory=dict)


Stage = Sequence[Part]
"""Parts that run at once: nothing in them is timed that the others disturb."""

_TRUTH: tuple[tuple[str, Callable[[Job, Emit], None]], ...] = (
    ("parity", check_parity),
    ("resume", check_resume),
    ("deterministic", check_deterministic),
    ("formats", check_formats),
    ("graphs", check_graphs),
    ("lstm", check_lstm),
)


def full_plan() -> list[Stage]:
    """For a GPU, in the order of what matters most."""
    return [
        [Part("machine", measure_machine, 60, 5), Part("text", prepare_text, 60, 5)],
        [Part(name, run, 160, 20) for name, run in _TRUTH],
        [Part("llama-1b", climb, 400, 40, {"size": "llama-1b"})],
        [Part("gpt2-124m", climb, 495, 30, {"size": "gpt2-124m"})],
        [Part("profile", profile_best, 535, 20, {"of": "llama-1b"})],
    ]


def small_plan() -> list[Stage]:
    """For a CPU: the same parts on small models, two at once, so that none of their code rots."""
    end = FULL_DEADLINE_S
    truth = [Part(name, run, end, 1) for name, run in _TRUTH]
    return [
        [Part("machine", measure_machine, end, 1), Part("text", prepare_text, end, 1)],
        *(truth[index : index + 2] for index in range(0, len(truth), 2)),
        [
            Part("llama-1b", climb, end, 1, {"size": "llama-1b"}),
            Part("gpt2-124m", climb, end, 1, {"size": "gpt2-124m"}),
        ],
        [Part("profile", profile_best, end, 1, {"of": "llama-1b"})],
    ]
