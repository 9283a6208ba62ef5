"""Plain PyTorch loops on ``fully_shard``, the yardsticks of the sharded strategies."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.contestants.contest import Contest
from benchmarks.contestants.plain_loop import PlainLoop
from sharding.blocks import find_blocks
from sharding.config import Strategy
from sharding.flat_collectives import exchanges_slices
from sharding.slice_collectives import use_slice_exchange


class PlainShardedLoop(PlainLoop):
    """The plain loop with each block and then the model in ``fully_shard``, as its tutorial has it.

    Stage 1 and 2 keep parameters after the forward pass (``reshard_after_forward=False``) and, while micro-batches are
    accumulated, after the backward pass; stage 3 keeps them after neither, but for what is in no block, which by
    torch's own default stays gathered from forward to backward. Stage 1 also holds gradients back until the last
    micro-batch (``set_requires_gradient_sync``). On GPUs parameters are gathered in bf16 and gradients reduced in fp32.
    AdamW and ``clip_grad_norm_`` work on the distributed tensors as they are.
    """

    def __init__(self, contest: Contest, strategy: Strategy) -> None:
        """Set up model, optimizer and loader.

        Args:
            contest: what all share.
            strategy: zero1, zero2 or zero3.
        """
        self._strategy = strategy
        super().__init__(contest)
        # The policy below casts.
        self._autocasts = False

    def _distribute(self, model: nn.Module) -> nn.Module:
        dtype = torch.bfloat16 if self._contest.uses_bf16 else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        frees = self._strategy == "zero3"
        for _, block in find_blocks(model):
            fully_shard(block, reshard_after_forward=frees, mp_policy=policy)
        # None is the default, by which the outermost module never frees after forward.
        fully_shard(model, reshard_after_forward=None, mp_policy=policy)
        self.settings = {
            "reshard_after_forward": {"blocks": frees, "model": None},
            "set_reshard_after_backward": "always" if frees else "last micro-batch",
            "set_requires_gradient_sync": "last micro-batch" if self._strategy == "zero1" else "always",
            "param_dtype": str(dtype),
            "reduce_dtype": "torch.float32",
        }
        return model

    def _communication(self, *, is_last: bool) -> AbstractContextManager[None]:
        model = self._model
        assert isinstance(model, FSDPModule)
        model.set_is_last_backward(is_last)
        if self._strategy == "zero1":
            model.set_requires_gradient_sync(is_last)
        if self._strategy != "zero3":
            model.set_reshard_after_backward(is_last)
        return nullcontext()

    def _whole(self, grad_norm: torch.Tensor) -> torch.Tensor:
        assert isinstance(grad_norm, DTensor)
        return grad_norm.full_tensor()


class TunedShardedLoop(PlainShardedLoop):
    """The plain sharded loop with what else the public API of ``fully_shard`` has to make it faster.

    Of stage 3, the last block stays gathered between its forward and its backward pass, and what is in no block between
    micro-batches. On gloo, each rank's slice is broadcast, and sums are taken of what ranks send one another, by
    ``set_custom_all_gather`` and ``set_custom_reduce_scatter``.
    """

    def _distribute(self, model: nn.Module) -> nn.Module:
        model = super()._distribute(model)
        *_, (_, last) = find_blocks(model)
        assert isinstance(last, FSDPModule)
        last.set_reshard_after_forward(reshard_after_forward=False)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                use_slice_exchange(module, None)
                # What travels so is summed; the mean is taken of the sum.
                module.set_force_sum_reduction_for_comms(exchanges_slices(None))
        self.settings |= {
            "reshard_after_forward": self.settings["reshard_after_forward"] | {"last block": False},
            "set_reshard_after_backward": "last micro-batch"
            if self._strategy != "zero3"
            else {"blocks": "always", "model": "last micro-batch"},
            "set_custom_all_gather": exchanges_slices(None),
            "set_custom_reduce_scatter": exchanges_slices(None),
        }
        return model

    def _communication(self, *, is_last: bool) -> AbstractContextManager[None]:
        model = self._model
        assert isinstance(model, FSDPModule)
        model.set_reshard_after_backward(is_last, recurse=self._strategy != "zero3")
        return super()._communication(is_last=is_last)
