"""Functions that are compiled for each shape of their arguments by itself."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def compiled_by_shape(function: Callable[_Arguments, _Result], backend: str) -> Callable[_Arguments, _Result]:
    """A function as one graph for each shape, by a backend of ``torch.compile``, of however many there are."""
    # Loaded with the compiler, and only then.
    from torch._dynamo.utils import disable_cache_limit

    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    @functools.wraps(function)
    def call(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
        # As torchao does around its own: the ninth shape is an error without.
        with disable_cache_limit():
            return compiled(*arguments, **named)

    return call
