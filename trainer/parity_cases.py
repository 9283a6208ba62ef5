"""The two sides of parity: engines on several ranks, and a plain loop that shares nothing with them."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn import functional

from sharding.config import Backend, ShardingEngine, Strategy
from sharding.engine import Engine
from sharding.mesh import build_mesh
from sharding.process_group import Ranks, process_group
from sharding.process_lifetime import die_with_parent
from trainer.config import RunConfig
from trainer.metrics import sum_over_ranks
from trainer.model_engine import build_model_engine, parameter_hash
from trainer.models import Vocabulary, build_model_config
from trainer.parity_optimizers import plain_optimizer
from trainer.tasks.registry import build_task

NUM_STEPS = 3


@dataclass(frozen=True)
class ParityCase:
    """One way to train: strategy, ranks, micro-batches a step, optimizer, backend, engine."""

    strategy: Strategy
    num_ranks: int
    accumulation_steps: int
    optimizer: str
    backend: Backend = "torch"
    engine: ShardingEngine = "fully_shard"

    @property
    def label(self) -> str:
        """A name for files."""
        return f"{self.mechanism}-{self.strategy}-{self.num_ranks}-{self.accumulation_steps}-{self.optimizer}"

    @property
    def mechanism(self) -> str:
        """What carries out the strategy."""
        return "bucketed" if self.engine == "bucketed" else self.backend


@dataclass(frozen=True)
class Trajectory:
    """What training left behind: global loss and gradient norm of each step."""

    losses: list[float]
    grad_norms: list[float]
    initial_hash: str = ""


def case_config(config: RunConfig, case: ParityCase, num_sequences: int) -> RunConfig:
    """The run's configuration made comparable: fp32, constant rate, the case's strategy, batch and optimizer."""
    parallel = config.parallel.model_copy(
        update={
            "strategy": case.strategy,
            "backend": case.backend,
            "engine": case.engine,
            "replicate": 2 if case.strategy == "hsdp" else 1,
        }
    )
    micro_size = num_sequences // (case.num_ranks * case.accumulation_steps)
    optimizer = config.optimizer.model_copy(update={"name": case.optimizer, "lr": case_lr(config, case.optimizer)})
    return config.model_copy(
        update={
            "parallel": parallel,
            "optimizer": optimizer,
            "batch": config.batch.model_copy(update={"global_size": num_sequences, "micro_size": micro_size}),
            "precision": config.precision.model_copy(update={"compute": "fp32"}),
        }
    )


def case_lr(config: RunConfig, optimizer: str) -> float:
    """The run's learning rate, but for SGD, which needs a larger one than Adam to move at all in a few steps."""
    return 0.1 if optimizer == "sgd" else config.optimizer.lr


def run_rank(
    rank: int, num_ranks: int, port: int, config_json: str, vocabulary: Vocabulary, cases_json: str, folder: Path
) -> None:
    """One rank of a group: run every case, and let rank 0 write trajectories and parameters to the folder."""
    die_with_parent()
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    config = RunConfig.model_validate(json.loads(config_json))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    with process_group(config.launch.init_timeout_s) as ranks:
        for values in json.loads(cases_json):
            _run_case(config, ParityCase(**values), vocabulary, ranks, folder)
    # Not by way of the interpreter's shutdown: see trainer.rank.end_process.
    os._exit(0)


def _run_case(config: RunConfig, case: ParityCase, vocabulary: Vocabulary, ranks: Ranks, folder: Path) -> None:
    batch = load_file(folder / "batch.safetensors")
    config = case_config(config, case, len(batch["labels"]))
    # Without a z-loss, which the plain loop does not have.
    task = build_task(config.task.name, loss_chunk_tokens=config.task.loss_chunk_tokens)
    mesh = build_mesh(config.parallel, ranks)
    engine, _ = build_model_engine(config, task, mesh, ranks, vocabulary)
    initial_hash = parameter_hash(engine, ranks)
    _write_parameters(engine, ranks, folder / f"{case.label}.initial.safetensors")
    rows = batch["labels"].chunk(ranks.world_size)[0].shape[0]
    local = {name: tensor[ranks.rank * rows : (ranks.rank + 1) * rows] for name, tensor in batch.items()}
    micro_batches = [
        {name: tensor.chunk(case.accumulation_steps)[index] for name, tensor in local.items()}
        for index in range(case.accumulation_steps)
    ]
    num_targets = task.num_targets(batch)
    losses, norms = [], []
    for _ in range(NUM_STEPS):
        loss_sum = engine.train_batch(micro_batches, num_targets)
        losses.append(sum_over_ranks(loss_sum[None], ranks)[0] / num_targets)
        norms.append(float(engine.clip_grad_norm(config.optimizer.clip_norm)))
        engine.step(config.optimizer.lr)
    _write_parameters(engine, ranks, folder / f"{case.label}.final.safetensors")
    if ranks.rank == 0:
        trajectory = Trajectory(losses, norms, initial_hash)
        (folder / f"{case.label}.json").write_text(json.dumps(asdict(trajectory)))


def _write_parameters(engine: Engine, ranks: Ranks, path: Path) -> None:
    """Put the slices of all ranks together on rank 0 and write them as whole tensors."""
    slices = [
        (part.name.removeprefix("model/"), part.global_shape, part.offsets, part.tensor.cpu())
        for part in engine.state(with_optimizer=False)
        if part.is_written_here
    ]
    gathered: list[Any] = [None] * ranks.world_size
    if ranks.world_size == 1:
        gathered = [slices]
    else:
        dist.gather_object(slices, gathered if ranks.rank == 0 else None, dst=0)
    if ranks.rank:
        return
    whole: dict[str, torch.Tensor] = {}
    for name, shape, offsets, tensor in (entry for part in gathered for entry in part):
        target = whole.setdefault(name, torch.full(shape, torch.nan))
        target[tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=True))] = tensor
    save_file(whole, path)


def run_plain(
    config: RunConfig, vocabulary: Vocabulary, folder: Path, initial: Path, optimizer_name: str
) -> tuple[Trajectory, dict[str, torch.Tensor]]:
    """The reference: one process, one whole batch, torch and transformers alone."""
    from transformers import AutoModelForCausalLM

    batch, clip_norm = load_file(folder / "batch.safetensors"), config.optimizer.clip_norm
    model_config = build_model_config(config.model, vocabulary, config.data.sequence_length)
    model = AutoModelForCausalLM.from_config(
        model_config, dtype=torch.float32, trust_remote_code=config.model.trust_remote_code
    )
    model.load_state_dict(load_file(initial), strict=False)
    model.tie_weights()
    lr = case_lr(config, optimizer_name)
    optimizer = plain_optimizer(model, config.optimizer, optimizer_name, lr)
    num_targets = (batch["labels"] != -100).sum()
    losses, norms = [], []
    for _ in range(NUM_STEPS):
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}, use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum") / num_targets
        loss.backward()
        norm = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]).norm()
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm or torch.inf, norm.float())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    return Trajectory(losses, norms), {name: p.detach() for name, p in model.named_parameters()}
