"""Releases that the profiler would not hear, since a thread of gloo is the last that holds a tensor."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import distributed as ddp
from torch.profiler import record_function

# After 0.05 s the release of a block now and then was not heard, on a machine with nothing else to do.
_PAUSE_S = 0.1


@contextmanager
def pauses(device: torch.device) -> Iterator[None]:
    """Wait a moment after each gathering and reduction on gloo.

    Its threads let go of a tensor a little later than the caller is told. Where the caller has let go by then, the
    profiler does not hear of the release.
    """
    names = [
        *("all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single"),
        *("broadcast", "all_to_all_single"),
    ]
    collectives = {name: getattr(dist, name) for name in names if hasattr(dist, name) and device.type == "cpu"}

    def pausing(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = collective(*args, **kwargs)
            time.sleep(_PAUSE_S)
            return result

        return call

    for name, collective in collectives.items():
        setattr(dist, name, pausing(collective))
    try:
        yield
    finally:
        for name, collective in collectives.items():
            setattr(dist, name, collective)


@contextmanager
def synchronisation_is_a_collective() -> Iterator[None]:
    """Count the buffer of DDP's first broadcast as what a collective allocates for itself.

    It is of all parameters, and gloo's threads often release it, which the profiler does not hear.
    """
    original = ddp._sync_module_states

    def named(*args: Any, **kwargs: Any) -> None:
        with record_function("c10d::sync_module_states"):
            original(*args, **kwargs)

    ddp._sync_module_states = named
    try:
        yield
    finally:
        ddp._sync_module_states = original
