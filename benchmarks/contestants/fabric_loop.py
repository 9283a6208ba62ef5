"""Lightning Fabric, as its guides "Efficient gradient accumulation" and "Training models with ... FSDP" have it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.contestants.contest import Contest, Contestant, StepLog, count_targets, ddp_options, summed_loss
from benchmarks.measure.turns import StepEdge
from sharding.blocks import find_blocks
from sharding.config import Strategy


class FabricLoop(Contestant):
    """Model, optimizer and loader through ``setup``; DDP options as for the plain loop."""

    name = "fabric"

    def __init__(self, contest: Contest) -> None:
        """Set everything up in the process group that is there."""
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments import TorchElasticEnvironment

        self._contest = contest
        self._log = StepLog()
        device, world_size = contest.ranks.device, contest.ranks.world_size
        num_local = contest.ranks.local_world_size
        self.settings: dict[str, Any] = {}
        strategy: Any = self._strategy() if world_size > 1 else "auto"
        self._fabric = Fabric(
            accelerator=device.type,
            devices=num_local if world_size > 1 or device.type == "cpu" else [device.index],
            num_nodes=world_size // num_local,
            strategy=strategy,
            # Ranks are there already, in torch's own variables, whoever started them.
            plugins=[TorchElasticEnvironment()] if world_size > 1 else None,
            precision=self._precision(),
        )
        self._fabric.launch()
        assert self._fabric.world_size == world_size
        model = contest.build_model()
        self._model, self._optimizer = self._set_up(model)
        self._schedule = contest.build_schedule(self._optimizer)
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
                with self._communication(is_last=index == len(batches) - 1):
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
                norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
                self._log.add(step, loss, norm, self._schedule.get_last_lr()[0])
            step_edge()

    def step_log(self) -> StepLog:
        """See Contestant."""
        return self._log

    def _strategy(self) -> Any:
        """Fabric's strategy for several ranks."""
        from lightning_fabric.strategies import DDPStrategy

        self.settings = ddp_options()
        return DDPStrategy(**self.settings)

    def _precision(self) -> Any:
        return "bf16-mixed" if self._contest.uses_bf16 else "32-true"

    def _set_up(self, model: nn.Module) -> tuple[Any, Any]:
        """Model and optimizer as Fabric wraps them."""
        wrapped, optimizer = self._fabric.setup(model, self._contest.build_optimizer(model))
        return wrapped, optimizer

    def _communication(self, *, is_last: bool) -> AbstractContextManager[None]:
        """What one micro-batch is computed in."""
        # On one rank there is nothing to hold back, and Fabric would warn.
        found: AbstractContextManager[None] = self._fabric.no_backward_sync(
            self._model, enabled=not is_last and self._fabric.world_size > 1
        )
        return found


class FabricShardedLoop(FabricLoop):
    """Its ``ModelParallelStrategy`` with ``fully_shard``, set up as for the plain loop.

    Its ``FSDPStrategy`` wants a GPU. Stage 1 holds gradients back by ``no_backward_sync``.
    """

    def __init__(self, contest: Contest, strategy: Strategy) -> None:
        """Set everything up in the process group that is there.

        Args:
            contest: what all share.
            strategy: zero1, zero2 or zero3.
        """
        self._stage = strategy
        self._sharded: FSDPModule | None = None
        super().__init__(contest)

    def _strategy(self) -> Any:
        from lightning_fabric.strategies import ModelParallelStrategy

        frees = self._stage == "zero3"
        dtype = torch.bfloat16 if self._contest.uses_bf16 else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)

        def shard(model: nn.Module, mesh: Any) -> nn.Module:
            for _, block in find_blocks(model):
                fully_shard(block, mesh=mesh["data_parallel"], reshard_after_forward=frees, mp_policy=policy)
            # torch's own rule for the outermost module, as for the plain sharded loop.
            self._sharded = fully_shard(model, mesh=mesh["data_parallel"], mp_policy=policy)
            return model

        self.settings = {
            "strategy": "ModelParallelStrategy",
            "reshard_after_forward": frees,
            "param_dtype": str(dtype),
            "no_backward_sync": self._stage == "zero1",
        }
        ranks = self._contest.ranks
        return ModelParallelStrategy(shard, data_parallel_size=ranks.world_size, tensor_parallel_size=1)

    def _precision(self) -> Any:
        # The policy casts.
        return "32-true"

    def _set_up(self, model: nn.Module) -> tuple[Any, Any]:
        # The optimizer's parameters are those of the sharded model.
        wrapped = self._fabric.setup_module(model)
        return wrapped, self._fabric.setup_optimizers(self._contest.build_optimizer(wrapped))

    def _communication(self, *, is_last: bool) -> AbstractContextManager[None]:
        assert self._sharded is not None
        self._sharded.set_is_last_backward(is_last)
        if self._stage != "zero3":
            self._sharded.set_reshard_after_backward(is_last)
        return super()._communication(is_last=is_last) if self._stage == "zero1" else nullcontext()
