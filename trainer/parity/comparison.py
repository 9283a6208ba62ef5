"""Every backend and strategy beside a plain PyTorch loop.

A few steps on one fixed batch of the run's samples, with ragged numbers of valid targets. A case that fails is a
row, and the others go on; one whose package is not installed is named.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from sharding.batch_norm import has_batch_norm
from sharding.blocks import hidden_matrices
from sharding.config import Backend, Strategy
from trainer.config import RunConfig
from trainer.config.optimizer import OptimizerName, refused_optimizer
from trainer.config.rules import BACKEND_STRATEGIES
from trainer.data.any_samples import prepared_facts
from trainer.data.prepare import prepare_samples
from trainer.distillation.begin import check_fit
from trainer.model.models import build_model_on_meta
from trainer.parity.batch import NUM_SAMPLES, without_dropout, write_ragged_batch
from trainer.parity.cases import Compute, ParityCase, Trained, Trajectory, compared_task
from trainer.parity.plain import run_plain
from trainer.parity.processes import result_file, run_group
from trainer.parity.restriction import some_to_freeze

LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-5, "fp16": 1e-5}
GRAD_NORM_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-4, "fp16": 1e-4}
"""Relative. In 16 bits strategies differ in the order of fp32 sums alone; now and then that moves a parameter over the
edge to another 16-bit number, which the norm shows first."""

PARAMETER_TOLERANCE = {"sgd": 1e-5, "adamw": 1e-2, "muon": 1e-2, "adafactor": 1e-2, "adamw8bit": 1e-2}
"""Largest difference of any parameter in fp32; Adam amplifies rounding where a gradient is nearly zero."""

PARAMETER_TOLERANCE_IN_16_BITS = {"sgd": 1e-4, "adamw": 6e-2, "muon": 6e-2, "adafactor": 6e-2, "adamw8bit": 6e-2}


@dataclass(frozen=True)
class ParityRow:
    """One case against the plain process: relative differences of loss and norm, absolute of parameters.

    ``unmoved`` names what should have changed and did not, ``strayed`` what was frozen and did. ``failure`` says why
    there are none, where a rank failed; ``factor`` how much wider the tolerances are.
    """

    case: ParityCase
    loss_difference: float
    grad_norm_difference: float
    parameter_difference: float
    unmoved: list[str]
    forward_saw_update: bool
    same_initial_parameters: bool
    failure: str = ""
    factor: float = 1.0
    strayed: Sequence[str] = ()

    @property
    def passed(self) -> bool:
        """Whether everything is inside its tolerance. NaN is not."""
        return (
            not self.failure
            and self.loss_difference <= self.factor * LOSS_TOLERANCE[self.case.compute]
            and self.grad_norm_difference <= self.factor * GRAD_NORM_TOLERANCE[self.case.compute]
            and self.parameter_difference <= self.factor * parameter_tolerance(self.case)
            and not self.unmoved
            and not self.strayed
            and self.forward_saw_update
            and self.same_initial_parameters
        )


def _factor(case: ParityCase, *, normalizes_batches: bool, compares_states: bool) -> float:
    """How much wider tolerances are than those of a language model.

    Under batch normalisation, what is rounded is divided by the variance of a few samples, and gradients are rounded on
    each rank where one process rounds those of all rows; and many gradients are zero but for rounding, of weights that
    normalisation takes away again, which Adam moves as far as all others. In 16 bits DeepSpeed and Accelerate average
    over ranks gradients that are as many times larger, of which others are too small for fp16; and ZeRO-3 of DeepSpeed
    rounds a parameter, and so its gradient, for each time that its module asks for it. Where hidden states are compared
    with a teacher's, which are close to them, a state that comes out as another 16-bit number changes their difference,
    and so the gradient, by much more than itself.
    """
    if normalizes_batches:
        return 100.0 if case.compute != "fp32" else 20.0 if case.optimizer in ("adamw", "muon", "adamw8bit") else 1.0
    is_wider = compares_states or case.backend in ("deepspeed", "accelerate")
    return 10.0 if case.compute != "fp32" and is_wider else 1.0


def parameter_tolerance(case: ParityCase) -> float:
    """Largest absolute difference of any parameter."""
    if case.compute != "fp32":
        return PARAMETER_TOLERANCE_IN_16_BITS[case.optimizer]
    return PARAMETER_TOLERANCE[case.optimizer]


ALWAYS_COMPARED: tuple[OptimizerName, ...] = ("adamw", "muon", "adafactor")
"""Optimizers beside SGD that every model can be trained with; 8-bit AdamW needs rows that divide into its blocks."""


def parity_cases(
    group_sizes: Sequence[int],
    optimizers: Sequence[OptimizerName] = ALWAYS_COMPARED,
    computes: Sequence[Compute] = ("fp32",),
    trained: Sequence[Trained] = ("all",),
) -> list[ParityCase]:
    """Every strategy on every group size that it can run on: SGD without and with accumulation, the others with it.

    Where one rank is all there is, the strategies that communicate run on it too. Formats beside fp32, and what else is
    trained than all, are tried with SGD and accumulation.
    """
    cases: list[ParityCase] = []
    for num_ranks in group_sizes:
        for backend, strategy in _pairs(num_ranks, alone=max(group_sizes) == 1):
            num_rows = NUM_SAMPLES // num_ranks
            accumulation_steps = num_rows if num_rows % 2 else num_rows // 2
            cases += [
                ParityCase(strategy, num_ranks, 1, "sgd", backend),
                *(
                    ParityCase(strategy, num_ranks, accumulation_steps, name, backend)
                    for name in ("sgd", *optimizers)
                    if refused_optimizer(name, backend) is None
                ),
                *(
                    ParityCase(strategy, num_ranks, accumulation_steps, "sgd", backend, compute)
                    for compute in computes
                    # Three ranks say nothing of formats that two do not.
                    if compute != "fp32" and num_ranks != 3
                ),
                *(
                    ParityCase(strategy, num_ranks, accumulation_steps, "sgd", backend, trained=part)
                    for part in trained
                    if part != "all"
                ),
            ]
    return cases


def _pairs(num_ranks: int, *, alone: bool) -> list[tuple[Backend, Strategy]]:
    """Backends and strategies to try on so many ranks; ``alone`` says that no group is larger than one rank."""
    if num_ranks == 4:
        return [("torch", "hsdp"), ("bucketed", "hsdp")]
    if num_ranks == 1 and not alone:
        return [("torch", "none")]
    left_out: set[tuple[Backend, Strategy]] = {("torch", "hsdp"), ("bucketed", "hsdp")}
    if not alone:
        left_out.add(("torch", "none"))
    if not torch.cuda.is_available():
        left_out.add(("accelerate", "zero3"))
    pairs = [(backend, strategy) for backend, strategies in BACKEND_STRATEGIES.items() for strategy in strategies]
    return [pair for pair in pairs if pair not in left_out]


def run_parity(config: RunConfig, cases: Sequence[ParityCase], folder: Path) -> list[ParityRow]:
    """Run the cases, one group of processes per number of ranks, and compare each with the plain process.

    Args:
        config: the run; dropout is set to 0, computation to each case's format.
        cases: what to run; their packages must be installed.
        folder: an empty folder for parameters and trajectories.

    Returns:
        A row for each case, also for one that failed; none for Muon where the model has nothing that it is for.

    Raises:
        UserError: the corpus cannot be prepared, or the model is not accepted.
    """
    config = without_dropout(config, folder)
    prepared = prepare_samples(config.data)
    if config.distill.teacher is not None:
        check_fit(config, prepared)
    facts = prepared_facts(prepared, config.data)
    task = compared_task(config, facts)
    write_ragged_batch(config, prepared, task, folder)
    model = build_model_on_meta(task, config.model, facts)
    normalizes_batches = has_batch_norm(model)
    if not hidden_matrices(model):
        cases = [case for case in cases if case.optimizer != "muon"]
    frozen = some_to_freeze(model)
    cases = [replace(case, frozen=frozen) if case.trained == "some" else case for case in cases]
    failures: dict[str, str] = {}
    for num_ranks in sorted({case.num_ranks for case in cases}):
        group = [case for case in cases if case.num_ranks == num_ranks]
        failures |= run_group(config, facts, group, num_ranks, folder)
    rows = []
    # Cases that one plain process is compared with.
    groups: dict[tuple[str | int, ...], list[ParityCase]] = {}
    for case in cases:
        # Statistics of a batch are of the rows that all ranks have in a micro-batch, and in 16 bits gradients are
        # rounded after each rank's own.
        is_divided = normalizes_batches or case.compute != "fp32"
        layout = (case.num_ranks, case.accumulation_steps) if is_divided else ()
        groups.setdefault((case.optimizer, case.compute, case.trained, *layout), []).append(case)
    pairs = config.distill.layers
    for _, matching in sorted(groups.items()):
        rows += [_failed_row(case, failures[case.label]) for case in matching if case.label in failures]
        trained = [case for case in matching if case.label not in failures]
        if trained:
            initial = folder / f"{trained[0].label}.initial.safetensors"
            plain = run_plain(config, facts, folder, initial, trained[0], normalizes_batches=normalizes_batches)
            compared = [_compare(case, *plain, initial, folder) for case in trained]
            rows += [
                replace(
                    row, factor=_factor(row.case, normalizes_batches=normalizes_batches, compares_states=bool(pairs))
                )
                for row in compared
            ]
    return rows


def _failed_row(case: ParityCase, reason: str) -> ParityRow:
    return ParityRow(case, math.nan, math.nan, math.nan, [], False, False, reason)


def _compare(
    case: ParityCase,
    plain: Trajectory,
    plain_tensors: dict[str, torch.Tensor],
    frozen: set[str],
    initial: Path,
    folder: Path,
) -> ParityRow:
    ours = Trajectory(**json.loads(result_file(folder, case).read_text()))
    before, after = (
        load_file(folder / f"{case.label}.initial.safetensors"),
        load_file(folder / f"{case.label}.final.safetensors"),
    )
    reference = load_file(initial)
    return ParityRow(
        case=case,
        loss_difference=_relative(ours.losses, plain.losses),
        grad_norm_difference=_relative(ours.grad_norms, plain.grad_norms),
        parameter_difference=_largest(
            (after[name].double() - tensor.double()).abs().max().item() for name, tensor in plain_tensors.items()
        ),
        # Buffers stay as they are, and so does what the loss does not depend on.
        unmoved=[
            name
            for name, tensor in plain_tensors.items()
            if torch.equal(after[name], before[name]) and not torch.equal(tensor, reference[name])
        ],
        # The batch never changes, so a forward pass that misses an update repeats the loss of the step before.
        forward_saw_update=all(
            abs(later - earlier) > 10 * LOSS_TOLERANCE["fp32"] * abs(earlier)
            for earlier, later in zip(ours.losses, ours.losses[1:], strict=False)
        ),
        same_initial_parameters=all(torch.equal(reference[name], tensor) for name, tensor in before.items()),
        strayed=[name for name in sorted(frozen) if not torch.equal(after[name], before[name])],
    )


def _relative(ours: Sequence[float], plain: Sequence[float]) -> float:
    return _largest(abs(a - b) / abs(b) for a, b in zip(ours, plain, strict=True))


def _largest(values: Iterable[float]) -> float:
    """The largest; NaN where one is, which Python's ``max`` would pass over."""
    return torch.tensor([0.0, *values], dtype=torch.float64).max().item()


def default_group_sizes() -> list[int]:
    """Ranks to try: 1 to 4 on a CPU; on GPUs as many of these as there are devices."""
    if torch.cuda.is_available():
        return [size for size in (1, 2, 3, 4) if size <= torch.cuda.device_count()]
    return [1, 2, 3, 4]
