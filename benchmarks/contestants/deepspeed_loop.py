"""DeepSpeed called directly, as its "Getting Started" has it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from benchmarks.contestants.contest import Contest, Contestant, StepLog, count_targets, summed_loss
from benchmarks.measure.turns import StepEdge
from sharding.config import Strategy
from sharding.deepspeed_backend.engine import import_deepspeed

_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


@dataclass(frozen=True)
class DeepSpeedTuning:
    """What is to be found out by trying.

    Attributes:
        overlap_comm: whether gradients travel during the backward pass.
        bucket_elements: size of the buckets of gradients and parameters; None for DeepSpeed's own.
        own_linear: whether stage 3 has DeepSpeed's ``memory_efficient_linear`` in place of torch's product.
    """

    overlap_comm: bool = True
    bucket_elements: int | None = None
    own_linear: bool = False

    @property
    def label(self) -> str:
        """The name of a contestant that is set up so."""
        size = "own buckets" if self.bucket_elements is None else f"buckets of {self.bucket_elements:,}"
        overlap = f"deepspeed {'with' if self.overlap_comm else 'without'} overlap, {size}"
        return overlap + (", own linear" if self.own_linear else "")


def tunings(strategy: Strategy) -> list[DeepSpeedTuning]:
    """What ``shardline bench scaling --field settings`` compares."""
    sizes = (None, 1 << 18, 1 << 20, 1 << 22)
    found = [DeepSpeedTuning(overlaps, size) for overlaps in (True, False) for size in sizes]
    return [*found, DeepSpeedTuning(own_linear=True)] if strategy == "zero3" else found


BEST_ON_CPU: dict[Strategy, DeepSpeedTuning] = {
    "zero1": DeepSpeedTuning(overlap_comm=False, bucket_elements=1 << 22),
    "zero2": DeepSpeedTuning(overlap_comm=False, bucket_elements=1 << 22),
    "zero3": DeepSpeedTuning(overlap_comm=False, bucket_elements=1 << 22),
}
"""The fastest of those on two CPU cores, as ``--field settings`` has measured them; a test reads its result."""


class DeepSpeedLoop(Contestant):
    """Model, optimizer and schedule through ``initialize``; forward, ``backward`` and ``step`` for each micro-batch.

    DeepSpeed clips, accumulates, and steps optimizer and schedule after the last micro-batch by itself. On GPUs it
    computes in bf16 by its own option, which also reduces gradients in bf16: less to move than for the others.
    ``overlap_comm`` and sizes of buckets are those that were fastest when they were measured in turns.
    """

    name = "deepspeed"

    def __init__(self, contest: Contest, strategy: Strategy, tuning: DeepSpeedTuning | None = None) -> None:
        """Initialise DeepSpeed in the process group that is there.

        Args:
            contest: what all share.
            strategy: zero1, zero2 or zero3.
            tuning: if None, the best that is known.
        """
        if tuning is None:
            tuning = BEST_ON_CPU[strategy] if contest.ranks.device.type == "cpu" else DeepSpeedTuning()
        self._contest = contest
        self._log = StepLog()
        batch = contest.config.batch
        zero = {"stage": _STAGES[strategy], "contiguous_gradients": True, "overlap_comm": tuning.overlap_comm}
        zero |= _buckets(strategy, tuning.bucket_elements)
        if strategy == "zero3":
            zero["memory_efficient_linear"] = tuning.own_linear
        self.settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": batch.micro_size,
            "gradient_accumulation_steps": contest.accumulation_steps,
            "train_batch_size": batch.global_size,
            "gradient_clipping": contest.config.optimizer.clip_norm,
            "bf16": {"enabled": contest.uses_bf16},
            "zero_optimization": zero,
            # torch's fused AdamW, as for all.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 62,
        }
        deepspeed = import_deepspeed(self.settings)
        model = contest.build_model()
        optimizer = contest.build_optimizer(model)
        torchs_linear = functional.linear
        self._engine, *_, self._schedule = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=contest.build_schedule(optimizer),
            config=self.settings,
            dist_init_required=False,
        )
        # Stage 3 puts its own into torch for the whole process: that is for its own turns.
        self._linear, functional.linear = functional.linear, torchs_linear
        assert self._engine.zero_optimization_stage() == _STAGES[strategy]
        assert self._engine.dp_world_size == contest.ranks.world_size

    def run(self, step_edge: StepEdge) -> None:
        """See Contestant."""
        contest, engine = self._contest, self._engine
        device, world_size = contest.ranks.device, contest.ranks.world_size
        micro_batches = iter(contest.build_loader())
        torchs_linear = functional.linear
        for step in range(1, contest.num_steps + 1):
            batches = [
                {name: tensor.to(device, non_blocking=True) for name, tensor in next(micro_batches).items()}
                for _ in range(contest.accumulation_steps)
            ]
            functional.linear = self._linear
            num_targets = count_targets(batches)
            torch.distributed.all_reduce(num_targets)
            loss_sum = torch.zeros((), device=device)
            for batch in batches:
                logits = engine(input_ids=batch["input_ids"], use_cache=False).logits
                loss = summed_loss(logits, batch["labels"])
                # It averages over ranks and micro-batches; the loss is a sum over both.
                engine.backward(loss * (world_size * contest.accumulation_steps) / num_targets)
                engine.step()
                loss_sum += loss.detach()
            if contest.is_logged(step):
                torch.distributed.all_reduce(loss_sum)
                norm = torch.as_tensor(engine.get_global_grad_norm())
                self._log.add(step, loss_sum / num_targets, norm, self._schedule.get_last_lr()[0])
            functional.linear = torchs_linear
            step_edge()

    def step_log(self) -> StepLog:
        """See Contestant."""
        return self._log


def _buckets(strategy: Strategy, num_elements: int | None) -> dict[str, Any]:
    if num_elements is None:
        return {}
    # Stage 3 gathers module by module, so many elements ahead.
    gathered = "stage3_prefetch_bucket_size" if strategy == "zero3" else "allgather_bucket_size"
    return {"reduce_bucket_size": num_elements, gathered: num_elements}
