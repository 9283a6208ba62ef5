"""The side of parity that is proven: engines on several ranks, and what they leave behind."""

import json
import os
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from sharding.config import Backend, Strategy
from sharding.engine import Batch, Engine
from sharding.mesh import build_mesh
from sharding.ranks.errors import EXIT_FAILED
from sharding.ranks.local_group import become_rank
from sharding.ranks.object_exchange import sum_over_ranks
from sharding.ranks.process_group import Ranks, process_group
from sharding.ranks.process_lifetime import die_with_parent
from sharding.state import MODEL_PREFIX
from trainer.config import RunConfig
from trainer.config.sections import LoraConfig, ModelConfig
from trainer.data.facts import SampleFacts
from trainer.distillation.loss import DistillationLoss
from trainer.distillation.teacher import build_teacher
from trainer.model.engine import build_model_engine, parameter_hash
from trainer.runtime.threads import threads_per_rank
from trainer.tasks.registry import configured_task
from trainer.tasks.task import Task

NUM_STEPS = 3

LOSS_SCALE = 1024.0
"""Of fp16: so small that no step overflows."""

Compute = Literal["fp32", "bf16", "fp16"]

Trained = Literal["all", "adapters", "some"]
"""What a case trains: what the run does, adapters (LoRA) alone, or only some of the parameters."""

_LORA_RANK = 4
# Their gradients are small, and a step must be seen in the loss.
_LORA_ALPHA = 64.0


@dataclass(frozen=True)
class ParityCase:
    """One way to train: strategy, ranks, micro-batches a step, optimizer, backend, number format, what is trained."""

    strategy: Strategy
    num_ranks: int
    accumulation_steps: int
    optimizer: str
    backend: Backend = "torch"
    compute: Compute = "fp32"
    trained: Trained = "all"
    frozen: Sequence[str] = ()
    """Names of the parameters that are not trained where only some are; ``run_parity`` chooses them."""

    @property
    def label(self) -> str:
        """A name for files."""
        parts = [self.backend, self.strategy, self.num_ranks, self.accumulation_steps, self.optimizer, self.compute]
        return "-".join(map(str, parts if self.trained == "all" else [*parts, self.trained]))

    @property
    def missing_package(self) -> str | None:
        """A package that the case needs and that is not installed."""
        needed = {
            "deepspeed": self.backend == "deepspeed",
            "accelerate": self.backend == "accelerate",
            "torchao": self.optimizer == "adamw8bit",
            "peft": self.trained == "adapters",
        }
        return next((name for name, is_needed in needed.items() if is_needed and find_spec(name) is None), None)


@dataclass(frozen=True)
class Trajectory:
    """What training left behind: global loss and gradient norm of each step."""

    losses: list[float]
    grad_norms: list[float]
    initial_hash: str = ""


def case_config(config: RunConfig, case: ParityCase, num_samples: int) -> RunConfig:
    """The run's configuration made comparable: constant rate, the case's strategy, format, batch and optimizer."""
    parallel = config.parallel.model_copy(
        update={
            "strategy": case.strategy,
            "backend": case.backend,
            "replicate": 2 if case.strategy == "hsdp" else 1,
        }
    )
    micro_size = num_samples // (case.num_ranks * case.accumulation_steps)
    optimizer = config.optimizer.model_copy(update={"name": case.optimizer, "lr": case_lr(config, case.optimizer)})
    return config.model_copy(
        update={
            "model": case_model(config.model, case),
            "parallel": parallel,
            "optimizer": optimizer,
            "batch": config.batch.model_copy(update={"global_size": num_samples, "micro_size": micro_size}),
            "precision": config.precision.model_copy(
                update={"compute": case.compute, "initial_loss_scale": LOSS_SCALE}
            ),
        }
    )


def case_model(model: ModelConfig, case: ParityCase) -> ModelConfig:
    """The section ``model`` of a case."""
    if case.trained == "adapters":
        return model.model_copy(update={"freeze": (), "lora": LoraConfig(rank=_LORA_RANK, alpha=_LORA_ALPHA)})
    return model.model_copy(update={"freeze": (*model.freeze, *case.frozen)})


def parts_to_train(config: RunConfig) -> tuple[Trained, ...]:
    """What cases of a run train: all that it does, and where that is all of a model also less."""
    if config.model.lora.rank or config.model.freeze:
        return ("all",)
    is_named = (config.model.architecture or config.model.pretrained) is not None
    has_adapters = is_named and config.model.quantize_aware is None
    return ("all", "some", "adapters") if has_adapters else ("all", "some")


def case_lr(config: RunConfig, optimizer: str) -> float:
    """The run's learning rate, but for SGD, which needs a larger one than Adam to move at all in a few steps."""
    return 0.1 if optimizer == "sgd" else config.optimizer.lr


def num_rows_of(batch: Batch) -> int:
    """Samples of a batch."""
    return len(next(iter(batch.values())))


def rows_of_micro_batches(case: ParityCase, num_rows: int) -> torch.Tensor:
    """Which rows of the batch are in which micro-batch of which rank, int64 [micro-batches, ranks, rows]."""
    rows = torch.arange(num_rows).view(case.num_ranks, case.accumulation_steps, -1)
    return rows.transpose(0, 1)


def compared_task(config: RunConfig, facts: SampleFacts, *, compiles_loss: bool = False) -> Task:
    """The run's task, of causal language modelling without a z-loss, which the plain loop does not have."""
    changes: dict[str, Any] = {"z_loss": 0.0} if is_plain_language_modelling(config) else {}
    return configured_task(config.task, facts, config.seed, compiles_loss=compiles_loss, **changes)


def is_plain_language_modelling(config: RunConfig) -> bool:
    """Whether the plain loop computes the loss by itself, and not by the task."""
    return config.task.name == "causal-lm" and config.model.factory is None


def run_rank(
    rank: int, num_ranks: int, port: int, config_json: str, facts: SampleFacts, cases_json: str, folder: Path
) -> None:
    """One rank of a group: run every case, and let rank 0 write trajectories and parameters to the folder.

    The first rank that fails in a case says why in the case's error file, and the process ends.
    """
    die_with_parent()
    become_rank(rank, num_ranks, port)
    config = RunConfig.model_validate(json.loads(config_json))
    torch.set_num_threads(threads_per_rank(config, num_ranks, os.environ))
    with process_group(config.launch.init_timeout_s) as ranks:
        for values in json.loads(cases_json):
            case = ParityCase(**values)
            try:
                _run_case(config, case, facts, ranks, folder)
            except BaseException as error:  # noqa: BLE001 - whatever it was, it is this case's row, and not the end
                traceback.print_exc()
                _write_error(error, rank, error_file(folder, case))
                # The others may be in a collective that this rank will not join.
                os._exit(EXIT_FAILED)
    # Not by way of the interpreter's shutdown: see trainer.rank.end_process.
    os._exit(0)


def error_file(folder: Path, case: ParityCase) -> Path:
    """Where a rank says why a case failed."""
    return folder / f"{case.label}.error"


def _write_error(error: BaseException, rank: int, path: Path) -> None:
    try:
        # The first to fail is the cause; others fail because it is gone.
        with path.open("x") as file:
            file.write(f"rank {rank}: {type(error).__name__}: {' '.join(str(error).split())}")
    except FileExistsError:
        pass


def _run_case(config: RunConfig, case: ParityCase, facts: SampleFacts, ranks: Ranks, folder: Path) -> None:
    batch = load_file(folder / "batch.safetensors")
    num_rows = num_rows_of(batch)
    config = case_config(config, case, num_rows)
    task = compared_task(config, facts, compiles_loss=config.compiles_loss)
    mesh = build_mesh(config.parallel, ranks)
    teacher = None if config.distill.teacher is None else build_teacher(config, facts, mesh, ranks)
    micro_batches = [
        {name: tensor[rows[mesh.data.rank]] for name, tensor in batch.items()}
        for rows in rows_of_micro_batches(case, num_rows)
    ]
    distilled = None if teacher is None else DistillationLoss(task, teacher, config.distill)
    if teacher is not None and config.distill.top_k is not None:
        answers = [teacher.answer_once(one, config.distill.top_k, config.distill.temperature) for one in micro_batches]
        micro_batches = [one | kept for one, (kept, _) in zip(micro_batches, answers, strict=True)]
        distilled = DistillationLoss(task, None, config.distill, num_kept_classes=answers[0][1])
    taught_by = "" if teacher is None else teacher.contents_hash(ranks)
    engine, _ = build_model_engine(
        config,
        task,
        mesh,
        ranks,
        facts,
        training_loss=distilled,
        add_modules=(lambda _: ()) if distilled is None else distilled.add_projections,
    )
    initial_hash = parameter_hash(engine, ranks)
    write_parameters(engine, ranks, folder / f"{case.label}.initial.safetensors")
    num_targets = task.num_targets(batch)
    losses, norms = [], []
    for _ in range(NUM_STEPS):
        loss_sum = engine.train_batch(micro_batches, num_targets)
        losses.append(sum_over_ranks(loss_sum[None], ranks)[0] / num_targets)
        norms.append(float(engine.clip_grad_norm(config.optimizer.clip_norm)))
        engine.step(config.optimizer.lr)
    write_parameters(engine, ranks, folder / f"{case.label}.final.safetensors")
    if teacher is not None and teacher.contents_hash(ranks) != taught_by:
        raise RuntimeError("the teacher is not what it was before training")
    if ranks.rank == 0:
        trajectory = Trajectory(losses, norms, initial_hash)
        (folder / f"{case.label}.json").write_text(json.dumps(asdict(trajectory)))


def write_parameters(engine: Engine, ranks: Ranks, path: Path) -> None:
    """Put the slices of all ranks together on rank 0 and write them as whole tensors."""
    slices = [
        (part.name.removeprefix(MODEL_PREFIX), part.global_shape, box.slices, piece.cpu())
        for part in engine.state(with_optimizer=False)
        if part.is_written_here
        for box, piece in part.pieces()
    ]
    gathered: list[Any] = [None] * ranks.world_size
    if ranks.world_size == 1:
        gathered = [slices]
    else:
        dist.gather_object(slices, gathered if ranks.rank == 0 else None, dst=0)
    if ranks.rank:
        return
    whole: dict[str, torch.Tensor] = {}
    for name, shape, place, tensor in (entry for part in gathered for entry in part):
        # What no slice covers stays NaN, in buffers of integers 0.
        unset = torch.nan if tensor.is_floating_point() else 0
        target = whole.setdefault(name, torch.full(shape, unset, dtype=tensor.dtype))
        target[place] = tensor
    save_file(whole, path)
