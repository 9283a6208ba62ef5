"""Releases that the profiler would not hear, since a thread of gloo is the last that holds a tensor."""

import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import distributed as ddp
from torch.profiler import record_function

_LONGEST_WAIT_S = 10.0
_NUM_OWN_REFERENCES = 4


@contextmanager
def heard_releases(device: torch.device) -> Iterator[None]:
    """Have a caller of each gathering and reduction on gloo go on only when gloo's threads have let go of its tensors.

    They do so a little later than they say that it is done. Where the caller has let go by then, a thread that the
    profiler does not listen to releases the memory, which would count as held for good.
    """
    names = [
        *("all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single"),
        *("broadcast", "all_to_all_single"),
    ]
    collectives = {name: getattr(dist, name) for name in names if hasattr(dist, name) and device.type == "cpu"}

    def heard(collective: Callable[..., dist.Work | None]) -> Callable[..., dist.Work | None]:
        signature = inspect.signature(collective)

        def call(*args: Any, **kwargs: Any) -> dist.Work | None:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            named = dict(given.arguments)
            is_async, named["async_op"] = named["async_op"], True
            aliases = []
            for name, value in named.items():
                if isinstance(value, torch.Tensor):
                    named[name] = value.detach()
                    aliases.append(named[name])
            work = collective(**named)
            del named, given
            # None is what a rank gets that is not in the group.
            heard_work = None if work is None else _HeardWork(work, aliases)
            del work, aliases
            if is_async or heard_work is None:
                return heard_work
            heard_work.wait()
            return None

        return call

    for name, collective in collectives.items():
        setattr(dist, name, heard(collective))
    try:
        yield
    finally:
        for name, collective in collectives.items():
            setattr(dist, name, collective)


class _HeardWork(dist.Work):
    """A collective under way, which is held here and by a thread of gloo, and holds aliases that nobody else has."""

    def __init__(self, work: dist.Work, aliases: list[torch.Tensor]) -> None:
        super().__init__()
        self._work: dist.Work | None = work
        self._aliases = aliases

    def wait(self, timeout: Any = None) -> bool:
        if self._work is not None:
            self._work.wait()
            self._work = None
            _wait_until(lambda: all(_is_ours_alone(alias) for alias in self._aliases))
            self._aliases = []
        return True

    def is_completed(self) -> bool:
        return self._work is None or self._work.is_completed()


def _is_ours_alone(alias: torch.Tensor) -> bool:
    # C++ holds the object of Python as well, and lets go of that last: by then there are a list, two names of it, and
    # the argument that asks.
    return alias._use_count() == 1 and sys.getrefcount(alias) <= _NUM_OWN_REFERENCES  # type: ignore[attr-defined]


def _wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for other threads.

    Raises:
        RuntimeError: it takes too long.
    """
    end = time.monotonic() + _LONGEST_WAIT_S
    while not is_so():
        if time.monotonic() > end:
            raise RuntimeError(f"a collective's memory is still held {_LONGEST_WAIT_S:.0f} s after its end")
        time.sleep(0.0005)


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
