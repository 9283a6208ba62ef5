"""Whether training on this device is right: beside one plain process, continued, repeated, compiled, in 8 bits."""

import itertools
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.device.job import MISSING, PASSED, Emit, Job, reason_of, status_of
from benchmarks.measure.measured_run import MeasuredRun, Windows
from benchmarks.measure.sizes import SIZES
from sharding.build_engine import build_engine
from sharding.config import (
    ActivationCheckpointingConfig,
    CompileConfig,
    ParallelConfig,
    PrecisionConfig,
    Strategy,
)
from sharding.engine import Batch, Engine, ModelDefinition
from sharding.mesh import build_mesh
from sharding.ranks.errors import EXIT_FINISHED
from sharding.ranks.process_group import Ranks, process_group
from trainer.config import RunConfig, load_config
from trainer.config.optimizer import OptimizerConfig
from trainer.data.packed import sample_facts
from trainer.data.prepare import prepare_corpus
from trainer.model.engine import build_model_engine
from trainer.optimizers.build import optimizer_factory
from trainer.parity.comparison import parity_cases, run_parity
from trainer.rank import main as run_rank
from trainer.tasks.registry import build_task

_INIT_TIMEOUT_S = 120.0
_RESUME_STEPS = 24
_FORMAT_STEPS = 15
# Kernels on a GPU may add up in another order each time, and 24 steps amplify that.
_RESUME_TOLERANCE = 2e-3
# Relative difference of a loss from that of bf16 without compilation.
_FORMAT_TOLERANCES = {"compiled": 1e-2, "fp16": 1e-2, "fp8 tensorwise": 5e-2, "fp8 rowwise": 5e-2, "fp32": 1e-2}
_GRADIENT_TOLERANCE = 1e-3


def prepare_text(job: Job, emit: Emit) -> None:
    """Train the tokenizer and pack the text that all parts train on."""
    config = load_config(SIZES["quickstart"].config, [*job.text, *job.quiet])
    corpus = prepare_corpus(config.data)
    corpus.check_sequence_length(load_config(SIZES["llama-1b"].config).data.sequence_length if job.has_gpu else 64)
    emit({"row": "text", "vocab_size": corpus.vocab_size})


def check_parity(job: Job, emit: Emit) -> None:
    """The engines of torch and ours on one rank beside a plain loop: SGD and AdamW, fp32 and bf16."""
    config = load_config(SIZES["tiny"].config, [*SIZES["tiny"].overrides, *job.text, *job.quiet])
    cases = [case for case in parity_cases([1], ["adamw"]) if case.backend in ("torch", "bucketed")]
    cases += [replace(case, compute="bf16") for case in cases if case.accumulation_steps > 1]
    folder = Path(job.scratch) / "parity"
    folder.mkdir()
    for row in run_parity(config, cases, folder):
        values = (row.loss_difference, row.grad_norm_difference, row.parameter_difference)
        names = ("loss_difference", "grad_norm_difference", "parameter_difference")
        found = {name: value if value == value else None for name, value in zip(names, values, strict=True)}
        emit({"row": row.case.label, **found, "reason": row.failure, "passed": row.passed})


def check_resume(job: Job, emit: Emit) -> None:
    """A run of 12 steps that is continued to 24, beside one of 24; each in a process of its own."""
    half = _RESUME_STEPS // 2
    straight = _losses_of_process(job, "straight", [_RESUME_STEPS])
    continued = _losses_of_process(job, "continued", [half, _RESUME_STEPS])
    difference = _largest_difference(continued, straight)
    tolerance = _RESUME_TOLERANCE if job.has_gpu else 0.0
    emit(
        {
            "row": f"{half} + {half} steps beside {_RESUME_STEPS}",
            "loss_difference": difference,
            "loss_first": straight[0],
            "loss_last": straight[-1],
            "passed": difference <= tolerance and straight[-1] < straight[0],
        }
    )


def check_deterministic(job: Job, emit: Emit) -> None:
    """``deterministic: true`` twice, and once more interrupted: bit for bit."""
    settings, half = ["deterministic=true"], _RESUME_STEPS // 2
    once = _losses_of_process(job, "once", [_RESUME_STEPS], settings)
    for name, steps in (("again", [_RESUME_STEPS]), ("continued", [half, _RESUME_STEPS])):
        losses = _losses_of_process(job, name, steps, settings)
        emit({"row": name, "loss_difference": _largest_difference(losses, once), "passed": losses == once})


def check_formats(job: Job, emit: Emit) -> None:
    """Compiled blocks, fp16, fp8 and fp32 for some steps beside bf16."""
    kinds: dict[str, list[str]] = {
        "bf16": ["precision.compute=bf16"],
        "compiled": ["precision.compute=bf16", "compile.enabled=true"],
        "fp16": ["precision.compute=fp16"],
        "fp32": ["precision.compute=fp32"],
        "fp8 tensorwise": ["precision.compute=fp8"],
        "fp8 rowwise": ["precision.compute=fp8", "precision.fp8_recipe=rowwise"],
    }
    reference: list[float] = []
    with process_group(_INIT_TIMEOUT_S) as ranks:
        for name, overrides in kinds.items():
            if name.startswith("fp8") and find_spec("torchao") is None:
                emit({"row": name, "status": MISSING, "reason": "torchao is not installed"})
                continue
            try:
                losses = _losses_here(_quickstart(job, [f"steps={_FORMAT_STEPS + 1}", *overrides]), ranks, job, name)
            except Exception as error:  # noqa: BLE001 - a format that fails is a row, and the others go on
                emit({"row": name, "status": status_of(error), "reason": reason_of(error), "passed": False})
                continue
            reference = reference or losses
            difference = _largest_difference(losses, reference)
            passed = difference <= _FORMAT_TOLERANCES.get(name, 0.0) and losses[-1] < losses[0]
            ends = {"loss_first": losses[0], "loss_last": losses[-1]}
            emit({"row": name, "status": PASSED, "loss_difference": difference, **ends, "passed": passed})


def check_graphs(job: Job, emit: Emit) -> None:
    """Gradients under ``compile.mode=reduce-overhead`` with two micro-batches a step beside eager ones.

    A finding, and no condition: the mode is refused until this has shown it right on a GPU.
    """
    with process_group(_INIT_TIMEOUT_S) as ranks:
        for strategy in ("none", "ddp", "zero2", "zero3"):
            row = {"row": f"reduce-overhead {strategy}"}
            try:
                differences = _graph_differences(job, strategy, ranks)
            except Exception as error:  # noqa: BLE001 - that graphs cannot do it is what is to be found
                emit(row | {"is_right": False, "reason": reason_of(error)})
                continue
            emit(row | {"gradient_difference": max(differences), "is_right": max(differences) <= _GRADIENT_TOLERANCE})


def check_lstm(job: Job, emit: Emit) -> None:
    """An LSTM, whose weights cuDNN wants in one piece, under ``fully_shard``: same losses as without, and all moves."""
    del job
    with process_group(_INIT_TIMEOUT_S) as ranks:
        reference: list[float] = []
        strategies: tuple[Strategy, ...] = ("none", "zero2", "zero3")
        for strategy in strategies:
            losses, unmoved = _train_lstm(strategy, ranks)
            reference = reference or losses
            difference = _largest_difference(losses, reference)
            changed = all(later != earlier for earlier, later in itertools.pairwise(losses))
            passed = difference <= _GRADIENT_TOLERANCE and not unmoved and changed
            found = {"loss_difference": difference, "unmoved": unmoved, "loss_changed": changed}
            emit({"row": f"lstm {strategy}", **found, "passed": passed})


def _quickstart(job: Job, overrides: Sequence[str]) -> RunConfig:
    """The quickstart on a GPU, its smallest form elsewhere, on one rank and logging every step."""
    size = SIZES["quickstart" if job.has_gpu else "tiny"]
    fixed = [
        "parallel.strategy=zero2",
        "metrics.every_steps=1",
        "schedule.name=constant",
        "schedule.total_steps=0",
        "schedule.warmup_steps=0",
    ]
    return load_config(size.config, [*size.overrides, *job.text, *job.quiet, *fixed, "optimizer.lr=1e-3", *overrides])


def _losses_of_process(job: Job, name: str, until: Sequence[int], overrides: Sequence[str] = ()) -> list[float]:
    """Losses of a run that is started, or continued, once for each number of steps.

    Raises:
        RuntimeError: it ended with another status than 0.
    """
    config = _quickstart(job, [f"steps={until[-1]}", f"name={name}", f"output_dir={job.scratch}", *overrides])
    path = Path(job.scratch) / f"{name}.json"
    # JSON is YAML.
    path.write_text(config.model_dump_json(by_alias=True, exclude_unset=True))
    # As rank_context does; nothing in this process has computed yet, so that it can be forked.
    context = multiprocessing.get_context("spawn") if job.has_gpu else multiprocessing.get_context("fork")
    for steps in until:
        arguments = [str(path), f"steps={steps}"]
        process = context.Process(target=_rank_process, args=(arguments,))
        process.start()
        process.join()
        if process.exitcode != EXIT_FINISHED:
            raise RuntimeError(f"python -m trainer {' '.join(arguments)} ended with status {process.exitcode}")
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return _numbers(json.loads(line)["train/loss"] for line in lines)


def _numbers(losses: Iterable[float | None]) -> list[float]:
    """Losses as they were: what was not finite is null in a file."""
    return [math.nan if loss is None else loss for loss in losses]


def _rank_process(arguments: Sequence[str]) -> None:
    sys.argv = ["trainer", *arguments]
    run_rank(arguments)


def _losses_here(config: RunConfig, ranks: Ranks, job: Job, name: str) -> list[float]:
    """Losses of a run's first steps, in this process."""
    folder = Path(job.scratch) / name.replace(" ", "-")
    folder.mkdir()
    rows: list[dict[str, Any]] = []

    def write(*, kind: str, **row: Any) -> None:
        rows.append({"kind": kind, **row})

    torch._dynamo.reset()
    MeasuredRun(config, ranks, Windows(0, 1, _FORMAT_STEPS), write).run(folder)
    return next(_numbers(row["losses"]) for row in rows if row["kind"] == "loss")


def _graph_differences(job: Job, strategy: str, ranks: Ranks) -> list[float]:
    """Relative differences of all gradients together, step by step: graphs are recorded in the first."""
    config = _quickstart(job, ["precision.compute=fp32", f"parallel.strategy={strategy}", "data.sequence_length=32"])
    corpus = prepare_corpus(config.data)
    generator = torch.Generator().manual_seed(0)
    gradients: dict[str, list[torch.Tensor]] = {}
    for mode in ("eager", "reduce-overhead"):
        torch._dynamo.reset()
        # Not by way of the rules, which refuse it.
        compilation = CompileConfig(enabled=mode != "eager", mode="default" if mode == "eager" else "reduce-overhead")
        changed = config.model_copy(update={"compile": compilation})
        engine, _ = build_model_engine(
            changed,
            build_task("causal-lm"),
            build_mesh(config.parallel, ranks),
            ranks,
            sample_facts(corpus, config.data),
        )
        generator.manual_seed(0)
        gradients[mode] = [
            _gradient_of_step(engine, corpus.vocab_size, generator, config.optimizer.lr) for _ in range(5)
        ]
    pairs = zip(gradients["eager"], gradients["reduce-overhead"], strict=True)
    return [float((graph - eager).norm() / eager.norm()) for eager, graph in pairs]


def _gradient_of_step(engine: Engine, vocab_size: int, generator: torch.Generator, lr: float) -> torch.Tensor:
    micro_batches = []
    for _ in range(2):
        tokens = torch.randint(vocab_size, (2, 33), generator=generator)
        micro_batches.append({"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()})
    engine.train_batch(micro_batches, 2 * 2 * 32)
    gradient = torch.cat([part.detach().double().flatten().cpu() for part in engine.named_local_gradients().values()])
    engine.clip_grad_norm(0.0)
    engine.step(lr)
    return gradient


class _Lstm(nn.Module):
    """Two LSTM layers that predict the next of a few symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 32)
        self.layers = nn.ModuleList([nn.LSTM(32, 32, batch_first=True) for _ in range(2)])
        self.head = nn.Linear(32, 16)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(symbols)
        for layer in self.layers:
            hidden, _ = layer(hidden)
        return self.head(hidden)


def _train_lstm(strategy: Strategy, ranks: Ranks) -> tuple[list[float], list[str]]:
    """Losses of a few steps of SGD on one batch, and names of parameters that did not move."""
    parallel = ParallelConfig(strategy=strategy)
    with torch.device("meta"):
        model = _Lstm()

    def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
        logits = module(batch["symbols"][:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["symbols"][:, 1:].flatten(), reduction="sum")

    def initialize(module: nn.Module) -> None:
        reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    engine = build_engine(
        ModelDefinition(model=model, initialize=initialize, loss=loss, evaluate=loss, seed=7),
        build_mesh(parallel, ranks),
        ranks.device,
        optimizer_factory(OptimizerConfig(name="sgd", lr=0.5, weight_decay=0.0), ()),
        parallel=parallel,
        precision=PrecisionConfig(compute="fp32"),
        activation_checkpointing=ActivationCheckpointingConfig(),
        compilation=CompileConfig(),
        deepspeed_settings={},
    )
    symbols = torch.randint(16, (8, 17), generator=torch.Generator().manual_seed(0))
    before = _shards(engine)
    losses = []
    for _ in range(5):
        losses.append(float(engine.train_batch([{"symbols": symbols}], 8 * 16)) / (8 * 16))
        engine.clip_grad_norm(1.0)
        engine.step(0.5)
    after = _shards(engine)
    return losses, [name for name, tensor in after.items() if torch.equal(tensor, before[name])]


def _shards(engine: Engine) -> Mapping[str, torch.Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in engine.named_local_shards().items()}


def _largest_difference(ours: Sequence[float], reference: Sequence[float]) -> float:
    """Largest relative difference; infinite where one is not finite or the numbers of steps differ."""
    if len(ours) != len(reference):
        return float("inf")
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True)]
    return max(difference if difference == difference else float("inf") for difference in differences)
