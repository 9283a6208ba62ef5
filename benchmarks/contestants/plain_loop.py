"""A plain PyTorch loop, the yardstick."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contestants.contest import Contest, Contestant, StepLog, count_targets, ddp_options, summed_loss
from benchmarks.measure.turns import StepEdge


class PlainLoop(Contestant):
    """What someone who knows PyTorch writes by hand, and no more.

    Included: DataLoader with DistributedSampler; the model in DistributedDataParallel with gradients as views of its
    buckets and no buffer broadcast, silent until the last micro-batch (``no_sync``); a loss normalised by the valid
    targets of the whole global batch, which takes an all-reduce of their number; bf16 autocast on GPUs; clipping by
    ``clip_grad_norm_``; fused AdamW whose vectors are not decayed; a LambdaLR schedule; loss, gradient norm and rate
    read and kept every so many steps.

    Left out, though Shardline does them: agreement on stopping, skipping of steps that are not finite, random
    generators seeded by the step, throughput and memory, metrics on disk, reading ahead. On one rank there is no
    DistributedDataParallel.
    """

    name = "plain"

    def __init__(self, contest: Contest) -> None:
        """Set up model, optimizer and loader."""
        self._contest = contest
        self._log = StepLog()
        self._is_distributed = contest.ranks.world_size > 1
        self._autocasts = contest.uses_bf16
        self.settings: dict[str, Any] = {}
        self._model = self._distribute(contest.build_model())
        self._parameters = list(self._model.parameters())
        self._optimizer = self._build_optimizer(self._model)
        self._schedule = contest.build_schedule(self._optimizer)
        self._steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def run(self, step_edge: StepEdge) -> None:
        """See Contestant."""
        contest = self._contest
        device, world_size = contest.ranks.device, contest.ranks.world_size
        micro_batches = iter(contest.build_loader())
        for step in range(1, contest.num_steps + 1):
            batches = [
                {name: tensor.to(device, non_blocking=True) for name, tensor in next(micro_batches).items()}
                for _ in range(contest.accumulation_steps)
            ]
            num_targets = count_targets(batches)
            if self._is_distributed:
                dist.all_reduce(num_targets)
            loss_sum = torch.zeros((), device=device)
            for index, batch in enumerate(batches):
                with self._communication(is_last=index == len(batches) - 1):
                    with torch.autocast(device.type, torch.bfloat16, enabled=self._autocasts):
                        logits = self._model(input_ids=batch["input_ids"], use_cache=False).logits
                        loss = summed_loss(logits, batch["labels"])
                    # Gradients are averaged over ranks; the loss is a sum over them.
                    (loss * world_size / num_targets).backward()
                loss_sum += loss.detach()
            grad_norm = nn.utils.clip_grad_norm_(self._parameters, contest.config.optimizer.clip_norm)
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad()
            self._steps.append((loss_sum, num_targets, grad_norm))
            if contest.is_logged(step):
                total = loss_sum.clone()
                if self._is_distributed:
                    dist.all_reduce(total)
                self._log.add(step, total / num_targets, self._whole(grad_norm), self._schedule.get_last_lr()[0])
            step_edge()

    def step_facts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss and gradient norm of every step so far, each fp64 [steps] on the host.

        Every rank must call it, between steps.
        """
        if not self._steps:
            return torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
        sums, counts, norms = (torch.stack(column).double().cpu() for column in zip(*self._steps, strict=True))
        dist.all_reduce(sums)
        return sums / counts, norms

    def step_log(self) -> StepLog:
        """See Contestant."""
        return self._log

    def _distribute(self, model: nn.Module) -> nn.Module:
        """Prepare the model for several ranks, before there is an optimizer."""
        if not self._is_distributed:
            return model
        device = self._contest.ranks.device
        self.settings = ddp_options()
        return DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, **self.settings
        )

    def _build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the distributed model."""
        return self._contest.build_optimizer(model)

    def _communication(self, *, is_last: bool) -> AbstractContextManager[None]:
        """What one micro-batch is computed in."""
        if is_last or not isinstance(self._model, DistributedDataParallel):
            return nullcontext()
        return self._model.no_sync()

    def _whole(self, grad_norm: torch.Tensor) -> torch.Tensor:
        """The gradient norm over all ranks; every rank must call it."""
        return grad_norm
