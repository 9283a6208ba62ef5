"""A model as a program of ``torch.export``, whose number of samples and length of texts are free."""

import copy
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from sharding.ranks.errors import UserError
from trainer.deploy.hf_folder import DTYPES
from trainer.deploy.model_call import ModelCall
from trainer.deploy.signature import BATCH, LENGTH, Dtype, Format, TensorSpec

LOGITS = "logits"
"""Name of the one output."""

_MIN_LENGTH = 4
"""Tokens of the texts that a program is made by: sizes below 2 are taken for fixed ones, and 2 is the batch's."""


def export_program(model: nn.Module, call: ModelCall, dtype: Dtype, file_format: Format) -> ExportedProgram:
    """Trace a model.

    Args:
        model: with weights, fp32 on the host, in evaluation mode.
        call: one call of it.
        dtype: what weights are held and computed in; inputs and outputs are fp32 all the same.
        file_format: what it is for, to speak of.

    Raises:
        UserError: torch cannot trace it, or not for any number of samples.
    """
    if dtype != "fp32":
        model = copy.deepcopy(model).to(DTYPES[dtype])
    example = {key: _enlarged(value, is_text=key in call.texts) for key, value in call.inputs.items()}
    shapes = {key: {0: Dim.DYNAMIC} | ({1: Dim.AUTO} if key in call.texts else {}) for key in example}
    try:
        with torch_says_nothing(), torch.no_grad(), whole_recurrences():
            return torch.export.export(_with_inputs(model, call, DTYPES[dtype]), (), example, dynamic_shapes=shapes)
    except Exception as error:  # noqa: BLE001 - whatever a model's own code does that cannot be traced
        raise UserError(
            f"--format {file_format} cannot hold {type(model).__name__}: torch.export says {first_line(error)}; give "
            "--format hf for a model of transformers, or let its forward pass do without what depends on values."
        ) from None


def save_program(program: ExportedProgram, file: Path) -> None:
    """Write a program as ``torch.export.load`` reads it, without the source lines of this machine that made it."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    with torch_says_nothing():
        torch.export.save(program, file)


def program_specs(program: ExportedProgram, call: ModelCall) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of a program, with names for the axes that are free."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    signature = program.graph_signature
    inputs = [values[name] for name in signature.user_inputs if isinstance(name, str)]
    names: dict[str, str] = {}
    for value in inputs:
        for dim, size in enumerate(value.shape):
            if _fixed(size) is None:
                names[str(size)] = BATCH if dim == 0 else LENGTH
    outputs = [values[name] for name in signature.user_outputs if isinstance(name, str)]
    specs = [_spec(key, value, names) for key, value in zip(call.inputs, inputs, strict=True)]
    return specs, [_spec(LOGITS, value, names) for value in outputs]


def call_specs(call: ModelCall) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of a model of `transformers`, which takes any number of samples and tokens."""
    specs = []
    for key, value in [*call.inputs.items(), (LOGITS, call.logits.float())]:
        has_length = key in call.texts or (key == LOGITS and bool(call.texts) and value.ndim == 3)
        shape: list[int | str] = [BATCH, *([LENGTH] if has_length else []), *value.shape[2 if has_length else 1 :]]
        specs.append(TensorSpec(name=key, dtype=_dtype_name(value), shape=shape))
    return specs[:-1], specs[-1:]


def max_program_length(program: ExportedProgram) -> int | None:
    """The most tokens that a program takes; None where it takes any number, or no texts."""
    found = []
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs and "val" in node.meta:
            found += [size for size in node.meta["val"].shape[1:2] if _fixed(size) is None]
    limits = [program.range_constraints[size.node.expr].upper for size in found]
    return min((int(limit) for limit in limits if limit.is_Integer), default=None)


@contextmanager
def torch_says_nothing() -> Iterator[None]:
    """Without what torch warns of and prints: graphs, and advice for whoever writes an exporter."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: Exception) -> str:
    """What an error says, as a part of a sentence."""
    text = str(error).replace("See the stack trace for more information.", "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")


def _with_inputs(model: nn.Module, call: ModelCall, dtype: torch.dtype) -> nn.Module:
    """A module that takes the inputs by their names and gives fp32 logits.

    ``torch.export`` names inputs as its forward pass does, and takes ``**inputs`` for one.
    """

    def forward(self: Any, **inputs: torch.Tensor) -> torch.Tensor:
        given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        made = self.model(**given, **call.constants)
        logits: torch.Tensor = getattr(made, "logits", made)
        return logits.float()

    named = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(key, named, annotation=torch.Tensor) for key in call.inputs]
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
    kind = type("NamedInputs", (nn.Module,), {"forward": forward})
    made: nn.Module = kind()
    made.model = model
    return made.eval()


def _enlarged(value: torch.Tensor, *, is_text: bool) -> torch.Tensor:
    """Two samples of it, long enough."""
    rows = value[:2] if len(value) > 1 else torch.cat([value, value])
    if is_text and rows.shape[1] < _MIN_LENGTH:
        rows = torch.cat([rows] * -(-_MIN_LENGTH // rows.shape[1]), dim=1)
    return rows.contiguous()


def _spec(name: str, value: Any, names: dict[str, str]) -> TensorSpec:
    fixed = [(size, _fixed(size)) for size in value.shape]
    shape = [names.get(str(size), str(size)) if number is None else number for size, number in fixed]
    return TensorSpec(name=name, dtype=_dtype_name(value), shape=shape)


def _fixed(size: Any) -> int | None:
    """An axis' size, where it has one."""
    return int(size) if isinstance(size, int) or size.node.expr.is_number else None


@contextmanager
def whole_recurrences() -> Iterator[None]:
    """Keep an LSTM or GRU as one operation: torch would unroll it over the very length of the text that it is shown."""
    try:
        from torch.export._patches import (
            register_gru_while_loop_decomposition,
            register_lstm_while_loop_decomposition,
        )
    except ImportError:
        # Of a torch that has none, texts have one length, as deployment.json then says.
        yield
        return
    operations = (torch.ops.aten.lstm.input, torch.ops.aten.gru.input)

    def look_anew() -> None:
        # An operation remembers what it is computed by once it was traced.
        for operation in operations:
            operation._dispatch_cache.clear()

    look_anew()
    try:
        with register_lstm_while_loop_decomposition(), register_gru_while_loop_decomposition():
            yield
    finally:
        look_anew()


def _dtype_name(value: Any) -> Any:
    return str(value.dtype).removeprefix("torch.")
