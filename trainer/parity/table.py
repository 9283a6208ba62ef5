"""The table of parity: one line per case, and what has no line."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from trainer.config.optimizer import OptimizerName, refused_optimizer
from trainer.config.rules import BACKEND_STRATEGIES
from trainer.parity.cases import NUM_STEPS
from trainer.parity.comparison import (
    GRAD_NORM_TOLERANCE,
    LOSS_TOLERANCE,
    PARAMETER_TOLERANCE,
    PARAMETER_TOLERANCE_IN_16_BITS,
    ParityRow,
)

_WORDS = ("backend", "strategy", "optimizer", "format", "trained", "result")


def print_table(rows: Sequence[ParityRow], console: Console) -> None:
    """Show one line per case."""
    table = Table(title=f"parity with one plain process: {NUM_STEPS} steps, dropout 0, ragged targets")
    for header in (
        "backend",
        "strategy",
        "ranks",
        "accumulation",
        "optimizer",
        "format",
        "trained",
        "loss",
        "grad norm",
        "parameters",
        "moved",
        "result",
    ):
        table.add_column(
            header,
            justify="left" if header in _WORDS else "right",
        )
    for row in rows:
        case = row.case
        table.add_row(
            case.backend,
            case.strategy,
            str(case.num_ranks),
            str(case.accumulation_steps),
            case.optimizer,
            case.compute,
            case.trained,
            f"{row.loss_difference:.1e}",
            f"{row.grad_norm_difference:.1e}",
            f"{row.parameter_difference:.1e}",
            "all" if not row.unmoved else f"not {len(row.unmoved)}",
            "pass" if row.passed else "FAIL",
        )
    console.print(table)
    console.print(
        f"tolerances in fp32: loss {LOSS_TOLERANCE['fp32']:.0e} relative, gradient norm "
        f"{GRAD_NORM_TOLERANCE['fp32']:.0e} relative, parameters "
        + ", ".join(f"{tolerance:.0e} ({name})" for name, tolerance in PARAMETER_TOLERANCE.items())
        + " absolute"
    )
    in_16_bits = [LOSS_TOLERANCE["bf16"], GRAD_NORM_TOLERANCE["bf16"], PARAMETER_TOLERANCE_IN_16_BITS["sgd"]]
    console.print(
        f"in bf16 and fp16 under sgd {', '.join(f'{tolerance:.0e}' for tolerance in in_16_bits)}, and ten times that "
        "under deepspeed and accelerate, and where hidden states are compared with a teacher's"
    )
    for row in rows:
        for problem in _problems(row):
            # gloo's own messages begin with a path in brackets, which would be taken for a style.
            console.print(f"{row.case.label}: {problem}", markup=False)


def row_values(row: ParityRow) -> dict[str, Any]:
    """One case for programs."""
    return {
        **asdict(row.case),
        "loss_difference": row.loss_difference,
        "grad_norm_difference": row.grad_norm_difference,
        "parameter_difference": row.parameter_difference,
        "passed": row.passed,
        "problems": _problems(row),
    }


def print_refusals(console: Console) -> None:
    """Say which combinations have no line, and why."""
    for backend, strategies in BACKEND_STRATEGIES.items():
        missing = [name for name in BACKEND_STRATEGIES["torch"] if name not in strategies]
        if missing:
            console.print(f"refused: {backend} with {', '.join(missing)}: it does {', '.join(strategies)} alone")
        for name in get_args(OptimizerName):
            reason = refused_optimizer(name, backend)
            if reason is not None:
                console.print(f"refused: {backend} with {name}: {reason}")
    if not torch.cuda.is_available():
        console.print("refused: accelerate with zero3: without a GPU it would train plain DDP")


def _problems(row: ParityRow) -> list[str]:
    if row.failure:
        return [row.failure]
    problems = []
    if row.unmoved:
        problems.append(f"parameters that did not move: {', '.join(row.unmoved)}")
    if row.strayed:
        problems.append(f"frozen parameters that moved: {', '.join(row.strayed)}")
    if not row.forward_saw_update:
        problems.append("a forward pass did not see the update before it")
    if not row.same_initial_parameters:
        problems.append("initial parameters differ from those of the other cases")
    return problems
