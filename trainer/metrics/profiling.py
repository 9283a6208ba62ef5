"""A torch trace and a memory snapshot of a few steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

_NUM_STEPS_BEFORE = 3
"""Steps of an attempt that are not recorded: compilation, allocation and caches settle in them."""


class StepProfiler:
    """Records consecutive steps of one rank into the run folder's ``profile``."""

    def __init__(
        self, folder: Path, num_steps: int, rank: int, device: torch.device, settle: Callable[[], None]
    ) -> None:
        """Plan to record ``num_steps`` steps, none where it is 0; ``settle`` is the engine's."""
        self._folder = folder
        self._num_steps = num_steps
        self._rank = rank
        self._device = device
        self._settle = settle
        self._num_seen = 0
        self._profile: profile | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Wrap one training step."""
        if self._num_steps and self._num_seen == _NUM_STEPS_BEFORE:
            self._settle()
            self._start()
        yield
        self._num_seen += 1
        if self._profile is not None and self._num_seen == _NUM_STEPS_BEFORE + self._num_steps:
            # torch's profiler crashes where it stops while a thread of gloo's records an operation.
            self._settle()
            self.close()

    def close(self) -> None:
        """Write what was recorded, if anything is being recorded."""
        if self._profile is None:
            return
        self._profile.stop()
        self._folder.mkdir(exist_ok=True)
        self._profile.export_chrome_trace(str(self._folder / f"rank-{self._rank}.trace.json"))
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self._folder / f"rank-{self._rank}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        else:
            table = self._profile.key_averages().table(sort_by="self_cpu_memory_usage", row_limit=50)
            (self._folder / f"rank-{self._rank}.memory.txt").write_text(table)
        self._profile = None

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        self._profile = profile(activities=activities, profile_memory=True)
        self._profile.start()
