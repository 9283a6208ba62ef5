"""Lightning Fabric, as its guide "Efficient gradient accumulation" has it."""

from typing import Any

import torch

from benchmarks.contestants.contest import Contest, Contestant, StepLog, count_targets, ddp_options, summed_loss
from benchmarks.measure.turns import StepEdge


class FabricLoop(Contestant):
    """Model, optimizer and loader through ``setup``; DDP options as for the plain loop."""

    name = "fabric"

    def __init__(self, contest: Contest) -> None:
        """Set everything up in the process group that is there."""
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments import TorchElasticEnvironment
        from lightning_fabric.strategies import DDPStrategy

        self._contest = contest
        self._log = StepLog()
        device, world_size = contest.ranks.device, contest.ranks.world_size
        num_local = contest.ranks.local_world_size
        self.settings: dict[str, Any] = ddp_options()
        strategy: Any = DDPStrategy(**self.settings) if world_size > 1 else "auto"
        self._fabric = Fabric(
            accelerator=device.type,
            devices=num_local if world_size > 1 or device.type == "cpu" else [device.index],
            num_nodes=world_size // num_local,
            strategy=strategy,
            # Ranks are there already, in torch's own variables, whoever started them.
            plugins=[TorchElasticEnvironment()] if world_size > 1 else None,
            precision="bf16-mixed" if contest.uses_bf16 else "32-true",
        )
        self._fabric.launch()
        assert self._fabric.world_size == world_size
        model = contest.build_model()
        optimizer = contest.build_optimizer(model)
        self._schedule = contest.build_schedule(optimizer)
        self._model, self._optimizer = self._fabric.setup(model, optimizer)
        self._loader = self._fabric.setup_dataloaders(contest.build_loader(), use_distributed_sampler=False)

    def run(self, step_edge: StepEdge) -> None:
        """See Contestant."""
        contest, fabric = self._contest, self._fabric
        micro_batches = iter(self._loader)
        for step in range(1, contest.num_steps + 1):
            batches = [next(micro_batches) for _ in range(contest.accumulation_steps)]
            num_targets = fabric.all_reduce(count_targets(batches), reduce_op="sum")
            loss_sum = torch.zeros((), device=fabric.device)
            for index, batch in enumerate(batches):
                is_accumulating = index < len(batches) - 1
                # On one rank there is nothing to hold back, and Fabric would warn.
                with fabric.no_backward_sync(self._model, enabled=is_accumulating and fabric.world_size > 1):
                    logits = self._model(input_ids=batch["input_ids"], use_cache=False).logits
                    loss = summed_loss(logits, batch["labels"])
                    fabric.backward(loss * fabric.world_size / num_targets)
                loss_sum += loss.detach()
            grad_norm = fabric.clip_gradients(
                # Asking whether the norm is finite would make the host wait for the device.
                self._model,
                self._optimizer,
                max_norm=contest.config.optimizer.clip_norm,
                error_if_nonfinite=False,
            )
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad()
            if contest.is_logged(step):
                # all_reduce works in place.
                loss = fabric.all_reduce(loss_sum.clone(), reduce_op="sum") / num_targets
                self._log.add(step, loss, grad_norm, self._schedule.get_last_lr()[0])
            step_edge()

    def step_log(self) -> StepLog:
        """See Contestant."""
        return self._log
