"""A plain PyTorch loop on ``fully_shard``, the yardstick of the sharded strategies."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.contestants.contest import Contest
from benchmarks.contestants.plain_loop import PlainLoop
from sharding.blocks import find_blocks
from sharding.config import Strategy


class PlainShardedLoop(PlainLoop):
    """The plain loop with each block and then the model in ``fully_shard``, as its tutorial has it.

    Stage 1 and 2 keep parameters after the forward pass (``reshard_after_forward=False``) and, while micro-batches are
    accumulated, after the backward pass; stage 3 does neither. Stage 1 also holds gradients back until the last
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
        fully_shard(model, reshard_after_forward=frees, mp_policy=policy)
        self.settings = {
            "reshard_after_forward": frees,
            "set_reshard_after_backward": "last micro-batch" if not frees else "always",
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
