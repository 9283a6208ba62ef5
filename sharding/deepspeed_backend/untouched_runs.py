"""Parts of flat partitions that an optimizer must not touch, though it updates each partition as one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

Runs = Mapping[int, Sequence[tuple[int, int]]]
"""By the id of a flat partition the offsets and sizes of parts of it, in elements."""


class UntouchedRuns:
    """Puts back what steps of an optimizer have changed: values and moments."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Attach to an optimizer whose parameters are flat partitions; it may step one partition at a time."""
        self._runs: Runs = {}
        self._kept: dict[tuple[int, int, str], torch.Tensor] = {}
        optimizer.register_step_pre_hook(self._keep)
        optimizer.register_step_post_hook(self._restore)

    @contextmanager
    def during_step(self, runs: Runs) -> Iterator[None]:
        """Leave these parts as they are."""
        self._runs = runs
        try:
            yield
        finally:
            self._runs = {}

    def _keep(self, optimizer: torch.optim.Optimizer, *_arguments: object) -> None:
        self._kept = {key: part.clone() for key, part in self._parts(optimizer)}

    def _restore(self, optimizer: torch.optim.Optimizer, *_arguments: object) -> None:
        for key, part in self._parts(optimizer):
            # Moments that this step has created were zero before it.
            part.copy_(self._kept[key]) if key in self._kept else part.zero_()
        self._kept = {}

    def _parts(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[tuple[int, int, str], torch.Tensor]]:
        if not self._runs:
            return
        for flat in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            tensors = {"": flat.detach()}
            tensors |= {key: v for key, v in optimizer.state.get(flat, {}).items() if v is not None and v.ndim}
            # What this rank has nothing of begins anywhere.
            for offset, size in (run for run in self._runs.get(id(flat), ()) if run[1]):
                for key, tensor in tensors.items():
                    yield (id(flat), offset, key), tensor[offset : offset + size]
