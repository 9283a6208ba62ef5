"""One rank of ``shardline bench memory``: each case's engine is built and steps while its memory is recorded."""

import gc
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from benchmarks.measure.allocations import Allocations
from benchmarks.measure.heard_releases import heard_releases, synchronisation_is_a_collective
from benchmarks.measure.rank_end import process_ends
from benchmarks.presentation.result_files import append_row
from sharding.engine import Batch, Engine
from sharding.mesh import build_mesh
from sharding.parallel_dims import parallel_dims
from sharding.part import local_tensor
from sharding.ranks.process_group import Ranks, process_group
from sharding.ranks.process_lifetime import die_with_parent
from trainer.architectures.config import build_model_config
from trainer.config import RunConfig, parse_config
from trainer.config.rules import accumulation_steps
from trainer.data.facts import SampleFacts
from trainer.model.engine import build_model_engine
from trainer.model.lora import add_adapters
from trainer.model.memory_estimate import MemoryEstimate, estimate_memory
from trainer.model.models import build_model_on_meta
from trainer.tasks.registry import configured_task

USES = ("masters", "moments", "gradients", "gathered")
"""What memory is told to be used for; the rest is on its way between ranks, or what operators need for a moment."""

NUM_STATE_TOKENS = 8
"""Tokens of a micro-batch whose activations are next to nothing, so that a step shows the state alone."""

# The first makes moments, and torch's DDP orders its buckets anew in the second.
_NUM_WARMUP_STEPS = 3


@dataclass(frozen=True)
class MemoryAssignment:
    """What a rank is told.

    Attributes:
        configs: by case, a run as plain values.
        threads: CPU threads of its operators.
        output: JSONL file that rank 0 appends to.
    """

    configs: dict[str, dict[str, Any]]
    threads: int
    output: str


def main(arguments: Sequence[str]) -> None:
    """Measure all cases; the only argument is a JSON file with a MemoryAssignment."""
    die_with_parent()
    assignment = MemoryAssignment(**json.loads(Path(arguments[0]).read_text()))
    torch.set_num_threads(assignment.threads)
    with process_ends():
        first = parse_config(next(iter(assignment.configs.values())), source="memory")
        with process_group(first.launch.init_timeout_s) as ranks:
            for case, values in assignment.configs.items():
                _measure(case, parse_config(values, source=case), ranks, Path(assignment.output))
                # Engines are in reference cycles.
                gc.collect()


def _measure(case: str, config: RunConfig, ranks: Ranks, output: Path) -> None:
    device = ranks.device
    num_micro_batches = accumulation_steps(config, parallel_dims(config.parallel, ranks.world_size))
    small = _batches(config, num_micro_batches, 1, NUM_STATE_TOKENS)
    large = _batches(config, num_micro_batches, config.batch.micro_size, config.data.sequence_length)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with Allocations(device, USES) as allocations, heard_releases(device):
        with synchronisation_is_a_collective():
            engine = _build(config, ranks)
        keeps_whole = config.parallel.strategy in ("none", "ddp", "zero1")
        with _watch(allocations, keeps_whole_gradients=keeps_whole):
            for _ in range(_NUM_WARMUP_STEPS):
                _step(engine, small, config, ranks)
            _tell_state(allocations, engine)
            device_peaks = [_recorded_step(allocations, engine, small, config, ranks, "state")]
            _step(engine, large, config, ranks)
            device_peaks.append(_recorded_step(allocations, engine, large, config, ranks, "batch"))
    own_bytes = sum(shard.numel() * shard.element_size() for shard in engine.named_local_shards().values())
    moments = {
        "rest": allocations.held_at("state step begins"),
        "backward done": allocations.held_at("state backward done"),
        "peak": allocations.peak_between("state step begins", "state step ends"),
        "batch peak": allocations.peak_between("batch step begins", "batch step ends"),
    }
    row = {
        "kind": "case",
        "case": case,
        "rank": ranks.rank,
        "moments": {name: split_masters(uses, own_bytes) for name, uses in moments.items()},
        "unnamed_at_peak": allocations.unnamed_at_peak("state step begins", "state step ends"),
        "transport": allocations.largest_transport(),
        "device_peaks": device_peaks,
        "formula": asdict(_estimate(config, ranks)),
    }
    # Every rank for itself: a line is written at once.
    append_row(output, row)
    dist.barrier()
    if ranks.rank == 0:
        print(f"{case}: done", flush=True)


def split_masters(uses: dict[str, int], own_bytes: int) -> dict[str, int]:
    """Bytes by use, where what lies in one piece with the masters beyond them is gathered copy.

    Args:
        uses: bytes by use.
        own_bytes: bytes of the masters' elements.
    """
    beyond = max(0, uses["masters"] - own_bytes)
    split = uses | {"masters": uses["masters"] - beyond, "gathered": uses["gathered"] + beyond}
    return {use or "other": num_bytes for use, num_bytes in split.items()}


def _facts(config: RunConfig) -> SampleFacts:
    return SampleFacts(config.data.sequence_length, config.data.vocab_size, 0)


def _build(config: RunConfig, ranks: Ranks) -> Engine:
    facts = _facts(config)
    mesh = build_mesh(config.parallel, ranks)
    task = configured_task(config.task, facts, z_loss=0.0)
    engine, _ = build_model_engine(config, task, mesh, ranks, facts)
    return engine


def _estimate(config: RunConfig, ranks: Ranks) -> MemoryEstimate:
    facts = _facts(config)
    model_config = build_model_config(config.model, facts)
    task = configured_task(config.task, facts, loss_chunk_tokens=0)
    model = build_model_on_meta(task, config.model, facts)
    add_adapters(model, config.model)
    dims = parallel_dims(config.parallel, ranks.world_size)
    return estimate_memory(config, model, model_config, dims, ranks.device)


def _batches(config: RunConfig, num_micro_batches: int, num_rows: int, length: int) -> list[Batch]:
    """Micro-batches of random tokens."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (num_micro_batches, num_rows, length)
    tokens = torch.randint(0, config.data.vocab_size, shape, generator=generator)
    return [{"input_ids": rows, "labels": rows.roll(-1, dims=-1)} for rows in tokens]


def _step(engine: Engine, batches: Sequence[Batch], config: RunConfig, ranks: Ranks) -> None:
    engine.train_batch(batches, sum(batch["labels"].numel() for batch in batches) * ranks.world_size)
    engine.clip_grad_norm(config.optimizer.clip_norm)
    engine.step(config.optimizer.lr)
    engine.settle()


def _recorded_step(
    allocations: Allocations, engine: Engine, batches: Sequence[Batch], config: RunConfig, ranks: Ranks, name: str
) -> int | None:
    """A step with marks; returns the device's own count of its peak in bytes, None on a CPU."""
    on_gpu = ranks.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    allocations.mark(f"{name} step begins")
    engine.train_batch(batches, sum(batch["labels"].numel() for batch in batches) * ranks.world_size)
    allocations.mark(f"{name} backward done")
    allocations.tell("gradients", engine.named_local_gradients().values())
    engine.clip_grad_norm(config.optimizer.clip_norm)
    engine.step(config.optimizer.lr)
    engine.settle()
    allocations.mark(f"{name} step ends")
    return torch.cuda.max_memory_allocated() if on_gpu else None


def _tell_state(allocations: Allocations, engine: Engine) -> None:
    allocations.tell("masters", engine.named_local_shards().values())
    slices = engine.state(with_optimizer=True)
    allocations.tell("moments", [part.tensor for part in slices if part.name.startswith("optimizer/")])


@contextmanager
def _watch(allocations: Allocations, *, keeps_whole_gradients: bool) -> Iterator[None]:
    """Tell of parameters when a module has just used them, and of both when backward has just made a gradient."""
    seen: set[int] = set()
    handles = []

    def see_gradient(parameter: torch.Tensor) -> None:
        allocations.tell("gathered", [local_tensor(parameter.detach())])
        if keeps_whole_gradients and parameter.grad is not None:
            allocations.tell("gradients", [local_tensor(parameter.grad)])

    def see_module(module: nn.Module, _arguments: object, _result: object) -> None:
        parameters = [p for p in module._parameters.values() if p is not None]
        if not parameters:
            return
        allocations.tell("gathered", [local_tensor(p.detach()) for p in parameters])
        for parameter in parameters:
            if id(parameter) not in seen and parameter.requires_grad:
                seen.add(id(parameter))
                handles.append(parameter.register_post_accumulate_grad_hook(see_gradient))

    # A hook of all modules: it runs before a block's own hook frees what was gathered.
    handles.append(register_module_forward_hook(see_module))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    main(sys.argv[1:])
