"""What `transformers` raises on a configuration that it cannot build or compute with, as one sentence of ours."""

import re
import traceback
from types import TracebackType

import torch

from sharding.ranks.errors import UserError

_SHAPES_DIFFER = re.compile(
    r"size of tensor|[Ss]izes of tensors must match|cannot be multiplied|is invalid for input of size|"
    r"same reduction dim|must match the (existing )?size|Expected size for first two dimensions|must be divisible|"
    r"strides should be multiple of|number of channels|doesn't match the broadcast shape"
)


def faults_of_a_configuration() -> tuple[type[Exception], ...]:
    """What its classes raise on fields that are missing, of a wrong type, or do not fit together."""
    from huggingface_hub.errors import StrictDataclassError

    return (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError,
            ValueError, StrictDataclassError)  # fmt: skip


def is_raised_by_transformers(error: Exception) -> bool:
    """Whether the innermost code that is not torch's is of transformers, and not of a user's own task or model."""
    rooms = [name.partition(".")[0] for name in _modules(error.__traceback__)]
    others = [room for room in rooms if room != "torch"]
    return bool(others) and others[-1] in ("transformers", "huggingface_hub")


def reason(error: Exception) -> str:
    """The first sentence of what an error says."""
    lines = str(error).strip().splitlines() or [""]
    # A StrictDataclassError has the reason last, behind its type.
    is_strict = type(error).__name__.startswith("StrictDataclass")
    line = (lines[-1] if is_strict else lines[0]).strip().removeprefix("ValueError: ")
    sentence = line.partition(". ")[0].rstrip(".")
    return sentence if is_strict or isinstance(error, ValueError) else f"{type(error).__name__}: {sentence}"


def cannot_compute(error: Exception, inputs: str) -> UserError | None:
    """The sentence for an error of a forward pass that the model's configuration is to blame for; None for others.

    Args:
        error: what the forward pass raised.
        inputs: what it was to compute on, in words.
    """
    if isinstance(error, NotImplementedError | torch.OutOfMemoryError) or not is_raised_by_transformers(error):
        return None
    do_not_fit = _SHAPES_DIFFER.search(str(error)) is not None
    if isinstance(error, RuntimeError) and not do_not_fit:
        return None
    remedy = "set other fields of model.config"
    if do_not_fit:
        remedy = (
            "its sizes do not fit together (num_attention_heads must be a multiple of num_key_value_heads, hidden_size "
            "often of num_attention_heads, and sizes of experts of 4)"
        )
    return UserError(
        f"the model cannot compute on {inputs}: {reason(error)}; {remedy}, or choose another model.architecture."
    )


def _modules(trace: TracebackType | None) -> list[str]:
    return [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(trace)]
