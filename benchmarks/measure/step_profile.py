"""Where the time of a step goes, from a profile of it, and what it is bound by."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

CATEGORIES = ("compute", "memory", "communication", "input", "host")
"""What an instant of a step can be spent on; see ``category_of`` and ``time_shares``. They add up to the step."""

INPUT_SPAN = "input"
"""Name of a ``record_function`` around the wait for a batch, in loops that do not use torch's DataLoader."""

BOUND_SHARE = 0.5
"""A step is bound by a category that takes at least this share of it."""

_EDGE = "benchmark step edge"
_SETTLE_S = 0.2
_DATA_LOADER = "enumerate(DataLoader)"
# Operators and kernels whose arithmetic per byte grows with their size.
_MATRIX_OPERATORS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::addbmm",
    "aten::_scaled_mm",
    "aten::_scaled_dot_product",
    "aten::_flash_attention",
    "aten::_efficient_attention",
    "aten::convolution",
)
_MATRIX_KERNELS = ("gemm", "cutlass", "xmma", "nvjet", "wgrad", "flash", "fmha", "sdpa", "attention")
# Before what a host does beside it. On a CPU an operator inside the wait for a batch is part of the wait.
_PRIORITY = {
    "cpu": ("input", "compute", "memory", "communication"),
    "cuda": ("compute", "memory", "communication", "input"),
}


@dataclass(frozen=True)
class Span:
    """Something that went on for a while.

    Attributes:
        category: one of ``CATEGORIES`` but host.
        start: when it began, in microseconds.
        end: when it ended.
    """

    category: str
    start: float
    end: float


def category_of(name: str, *, is_on_gpu: bool, device_type: str) -> str | None:
    """What an event of the profiler counts as; None for one that does not count.

    On a CPU operators count (``aten::...``), and a collective from when it is called (``c10d::...``) until it is
    finished (``gloo:...``). On a GPU kernels and copies on the device count, those of NCCL as communication, and of the
    host its waiting: gloo's collectives and batches.

    Args:
        name: the event's.
        is_on_gpu: whether it ran on the device rather than on the host.
        device_type: where the step computes: ``cpu`` or ``cuda``.
    """
    if is_on_gpu:
        lowered = name.lower()
        if "nccl" in lowered:
            return "communication"
        return "compute" if any(part in lowered for part in _MATRIX_KERNELS) else "memory"
    if name == INPUT_SPAN or name.startswith(_DATA_LOADER):
        return "input"
    if name.startswith("gloo:"):
        return "communication"
    if device_type == "cpu" and name.startswith("c10d::"):
        return "communication"
    if device_type == "cpu" and name.startswith("aten::"):
        return "compute" if name.startswith(_MATRIX_OPERATORS) else "memory"
    return None


def time_shares(spans: Iterable[Span], begin: float, end: float, priority: Sequence[str]) -> dict[str, float]:
    """What share of a window each category takes: an instant counts once, as the first in ``priority`` that goes on.

    So communication is exposed communication: a collective is under way, and nothing is computed meanwhile. An instant
    in which nothing goes on is the host's: the interpreter, a launch, a wait for another thread.

    Args:
        spans: what went on, in any order; they may overlap and reach out of the window.
        begin: of the window, in microseconds.
        end: of the window.
        priority: categories but host.

    Returns:
        By category; the shares add up to 1.
    """
    changes = []
    for span in spans:
        if span.end > begin and span.start < end and span.end > span.start:
            changes += [(max(span.start, begin), 1, span.category), (min(span.end, end), -1, span.category)]
    changes.sort()
    active = dict.fromkeys(priority, 0)
    totals = dict.fromkeys(CATEGORIES, 0.0)
    now = begin
    for moment, change, category in [*changes, (end, 0, priority[0])]:
        current = next((name for name in priority if active[name]), "host")
        totals[current] += moment - now
        active[category] += change
        now = moment
    return {name: total / (end - begin) for name, total in totals.items()}


def busy_share(spans: Iterable[Span], begin: float, end: float, category: str) -> float:
    """What share of a window a category goes on for, whatever else does: for communication, exposed or not."""
    return time_shares([span for span in spans if span.category == category], begin, end, (category,))[category]


def verdict(shares: Mapping[str, float]) -> str:
    """What a step is bound by, as a sentence.

    A category that takes at least ``BOUND_SHARE`` of the step binds it; where none does, the two largest do. Taking a
    share s away altogether leaves 1 - s of the step, which limits what can be gained (Amdahl, "Validity of the single
    processor approach to achieving large scale computing capabilities", 1967).

    Args:
        shares: of each category, see ``time_shares``.
    """
    described = {
        "compute": "matrix products and attention",
        "memory": "operators that move more than they compute",
        "communication": "communication that nothing hides",
        "input": "waiting for batches",
        "host": "the host's",
    }
    first, second, *_ = sorted(CATEGORIES, key=lambda name: -shares[name])
    exposed = shares["communication"]
    gain = f"; {exposed:.0%} could be saved at most by hiding all communication" if exposed else ""
    if shares[first] >= BOUND_SHARE:
        return f"bound by {first}: {shares[first]:.0%} of a step is {described[first]}{gain}."
    return (
        f"bound by {first} and {second}: {shares[first]:.0%} of a step is {described[first]}, {shares[second]:.0%} "
        f"{described[second]}{gain}."
    )


class StepProfile:
    """Profiles a turn of several steps; a Watcher of ``Turns``. The first step is not looked at: it settles."""

    def __init__(self, device: torch.device) -> None:
        """Plan a profile of what this rank does."""
        self._device_type = device.type
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile = profile(activities=activities)

    def begin(self) -> None:
        """See Watcher."""
        self._profile.start()

    def edge(self) -> None:
        """See Watcher."""
        with record_function(_EDGE):
            pass

    def end(self) -> None:
        """See Watcher; whoever takes the turn has waited for its collectives by now."""
        # A thread of gloo's notes the end of a collective after those who wait for it go on. Where ranks share cores,
        # it may come to that late, and torch has been seen to crash that gathered events meanwhile.
        time.sleep(_SETTLE_S)
        self._profile.stop()

    def longest(self, num: int) -> list[dict[str, Any]]:
        """The kernels, or on a CPU the operators, that took the most time, with calls and milliseconds of all steps."""
        on_gpu = self._device_type == "cuda"
        kind, attribute = (
            (DeviceType.CUDA, "self_device_time_total") if on_gpu else (DeviceType.CPU, "self_cpu_time_total")
        )
        # On a GPU's timeline spans that the host has named lie over the kernels in them.
        found = [
            event
            for event in self._profile.key_averages()
            if event.device_type == kind and not (on_gpu and event.is_user_annotation)
        ]
        total = sum(getattr(event, attribute) for event in found) or 1.0
        found.sort(key=lambda event: -getattr(event, attribute))
        return [
            {
                "name": event.key,
                "num_calls": event.count,
                "total_ms": getattr(event, attribute) / 1e3,
                "share": getattr(event, attribute) / total,
            }
            for event in found[:num]
        ]

    def shares(self) -> dict[str, float]:
        """Each category's share of the steps, ``communication_busy``, and ``step_s``, the time of a profiled step.

        The steps are those between the first edge and the last. On a GPU the host's edges lie a little before the
        device's, all by about as much.
        """
        spans, edges = [], []
        for event in self._profile.events():
            start, end = event.time_range.start, event.time_range.end
            if event.name == _EDGE and event.device_type == DeviceType.CPU:
                edges.append(start)
                continue
            is_on_gpu = event.device_type == DeviceType.CUDA
            if is_on_gpu and event.is_user_annotation:
                # A span that the host has named, over the kernels in it and what lies between them.
                continue
            category = category_of(event.name, is_on_gpu=is_on_gpu, device_type=self._device_type)
            if category is not None:
                spans.append(Span(category, start, end))
        begin, end = min(edges), max(edges)
        found = time_shares(spans, begin, end, _PRIORITY[self._device_type])
        found["communication_busy"] = busy_share(spans, begin, end, "communication")
        found["step_s"] = (end - begin) / (len(edges) - 1) / 1e6
        return found
