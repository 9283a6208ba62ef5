"""Accelerate, as its guide "Performing gradient accumulation" has it for samples of variable size."""

from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.contestants.contest import Contest, Contestant, StepLog, as_read, count_targets, summed_loss
from benchmarks.measure.turns import StepEdge


class AccelerateLoop(Contestant):
    """Model, optimizer, loader and scheduler through ``prepare``; the loss normalised by gathered token counts."""

    name = "accelerate"

    def __init__(self, contest: Contest) -> None:
        """Prepare everything."""
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        self._contest = contest
        self._log = StepLog()
        self.settings: dict[str, Any] = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        self._accelerator = Accelerator(
            cpu=contest.ranks.device.type == "cpu",
            mixed_precision="bf16" if contest.uses_bf16 else "no",
            kwargs_handlers=[DistributedDataParallelKwargs(**self.settings)],
        )
        assert self._accelerator.num_processes == contest.ranks.world_size
        model = contest.build_model()
        optimizer = contest.build_optimizer(model)
        # Its scheduler steps once per process, since it expects the loader of a single process.
        schedule = contest.build_schedule(optimizer, calls_per_step=contest.ranks.world_size)
        loader = DataLoader(contest.dataset(), batch_size=contest.config.batch.micro_size, collate_fn=as_read)
        self._model, self._optimizer, self._loader, self._schedule = self._accelerator.prepare(
            model, optimizer, loader, schedule
        )

    def run(self, step_edge: StepEdge) -> None:
        """See Contestant."""
        contest, accelerator = self._contest, self._accelerator
        micro_batches = iter(self._loader)
        for step in range(1, contest.num_steps + 1):
            batches = [next(micro_batches) for _ in range(contest.accumulation_steps)]
            num_targets = accelerator.gather(count_targets(batches)).sum()
            loss_sum = torch.zeros((), device=accelerator.device)
            for index, batch in enumerate(batches):
                is_last = index == len(batches) - 1
                with nullcontext() if is_last else accelerator.no_sync(self._model):
                    logits = self._model(input_ids=batch["input_ids"], use_cache=False).logits
                    loss = summed_loss(logits, batch["labels"])
                    accelerator.backward(loss * accelerator.num_processes / num_targets)
                loss_sum += loss.detach()
            accelerator.sync_gradients = True
            grad_norm = accelerator.clip_grad_norm_(self._model.parameters(), contest.config.optimizer.clip_norm)
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad()
            if contest.is_logged(step):
                loss = accelerator.reduce(loss_sum, "sum") / num_targets
                self._log.add(step, loss, grad_norm, self._schedule.get_last_lr()[0])
            step_edge()

    def step_log(self) -> StepLog:
        """See Contestant."""
        return self._log
