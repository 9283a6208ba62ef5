"""Batch normalisation over the micro-batches of all ranks that read different data, as one process would have it.

torch's own normalises each rank's rows by themselves: another model for every number of ranks, with statistics that
differ from rank to rank. Its ``SyncBatchNorm`` needs GPUs.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from sharding.blocks import find_blocks
from sharding.config import ActivationCheckpointingConfig
from sharding.mesh import ParallelMesh
from sharding.ranks.errors import UserError

RUNNING_STATISTICS = ("running_mean", "running_var")
"""Buffers by which evaluation normalises."""


class SynchronizedBatchNorm(_BatchNorm):
    """Batch normalisation by the mean and variance of all ranks' rows, each rank's weighted by their number.

    An existing layer becomes one by its class: parameters, buffers and their names stay. A forward pass in training
    gathers each rank's count, mean and centred squares in fp64, and every rank combines them in the same order, so
    that running statistics are the same on all ranks bit for bit. Every rank must take part in every pass, also one
    without rows. Statistics that are not finite leave the running ones as they were: the step will be skipped, and
    nothing else of it is kept either.
    """

    # One without is refused.
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    _group: dist.ProcessGroup | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalised rows, [n, channels, ...], in the format that they have.

        Raises:
            UserError: one value of each channel is all there is, on one rank.
        """
        channels = [1, -1] + [1] * (input.ndim - 2)
        # In fp32 throughout, whatever precision the layers around it have.
        rows = input.float()
        if self.training:
            mean, square_sum, count = self._statistics(rows)
            variance = square_sum / count.clamp(min=1.0)
            self._keep(mean, square_sum, count)
            rstd = (variance + self.eps).rsqrt().float()
            normalized = _Normalization.apply(rows, mean.float(), rstd, count, channels, self._group)
        else:
            rstd = (self.running_var + self.eps).rsqrt()
            normalized = (rows - self.running_mean.view(channels)) * rstd.view(channels)
        if self.affine:
            normalized = normalized * self.weight.view(channels) + self.bias.view(channels)
        return normalized.to(input.dtype)

    @torch.no_grad()
    def _statistics(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean and sum of centred squares of each channel over all ranks, and the values that a channel has; fp64.

        Ranks are combined as in Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
        Sample Variances" (1979).
        """
        dims = [dim for dim in range(rows.ndim) if dim != 1]
        num_values = rows.numel() // max(rows.shape[1], 1)
        if self._group is None and num_values == 1:
            raise UserError(
                "batch normalisation over one value has no variance: a micro-batch of one rank is one row; raise "
                "batch.micro_size, or train without batch normalisation."
            )
        # About the mean as fp32 has it, and corrected by what that is off.
        near = rows.sum(dims, dtype=torch.float64).div(max(num_values, 1)).float()
        centred = rows - near.view([1, -1] + [1] * (rows.ndim - 2))
        rest = centred.sum(dims, dtype=torch.float64)
        mean = near.double() + rest / max(num_values, 1)
        square_sum = centred.square().sum(dims, dtype=torch.float64) - rest.square() / max(num_values, 1)
        count = torch.full((1,), float(num_values), dtype=torch.float64, device=rows.device)
        if self._group is None:
            return mean, square_sum, count
        own = torch.cat([count, mean, square_sum])
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(gathered, own, group=self._group)
        counts, means, square_sums = torch.stack(gathered).split([1, len(mean), len(mean)], dim=1)
        count = counts.sum(dim=0)
        mean = (counts * means).sum(dim=0) / count.clamp(min=1.0)
        return mean, (square_sums + counts * (means - mean).square()).sum(dim=0), count

    @torch.no_grad()
    def _keep(self, mean: torch.Tensor, square_sum: torch.Tensor, count: torch.Tensor) -> None:
        """Move the running statistics towards those of a micro-batch of all ranks, if they are finite."""
        variance = square_sum / (count - 1.0).clamp(min=1.0)
        is_usable = mean.isfinite().all() & variance.isfinite().all() & (count > 0).all()
        self.num_batches_tracked += is_usable
        share = torch.full_like(count, self.momentum) if self.momentum is not None else None
        if share is None:
            share = self.num_batches_tracked.double().clamp(min=1.0).reciprocal()
        for running, found in ((self.running_mean, mean), (self.running_var, variance)):
            moved = (1.0 - share) * running.double() + share * found
            running.copy_(torch.where(is_usable, moved, running.double()))

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Nothing: what became one of these takes what it took."""


class _Normalization(torch.autograd.Function):
    """(rows - mean) * rstd, whose mean and rstd are functions of the rows of all ranks.

    The gradient takes the sums of dy and of dy times the normalised rows over all ranks; those of weight and bias
    are made outside, from this rank's rows alone, and added up as all gradients are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        count: torch.Tensor,
        channels: list[int],
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        normalized = (rows - mean.view(channels)) * rstd.view(channels)
        ctx.save_for_backward(normalized, rstd, count)
        ctx.channels, ctx.group = channels, group
        return normalized

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normalized, rstd, count = ctx.saved_tensors
        (gradient,) = gradients
        dims = [dim for dim in range(gradient.ndim) if dim != 1]
        sums = torch.stack(
            [gradient.sum(dims, dtype=torch.float64), (gradient * normalized).sum(dims, dtype=torch.float64)]
        )
        if ctx.group is not None:
            dist.all_reduce(sums, group=ctx.group)
        means = (sums / count.clamp(min=1.0)).float()
        of_rows = gradient - means[0].view(ctx.channels) - normalized * means[1].view(ctx.channels)
        return of_rows * rstd.view(ctx.channels), None, None, None, None, None


def refuse_batch_norm(model: nn.Module, checkpointing: ActivationCheckpointingConfig) -> None:
    """Refuse batch normalisation that would not train what one process does.

    Args:
        model: the model, whose blocks are recomputed as the settings say.
        checkpointing: what is recomputed.

    Raises:
        UserError: a layer in a block that is recomputed, which would count each micro-batch twice, one without running
            statistics, or one that keeps them of each sample by itself, and so of this rank's alone.
    """
    for name, module in model.named_modules():
        if isinstance(module, _InstanceNorm) and module.running_mean is not None:
            raise UserError(
                f"{name} keeps running statistics of this rank's samples (InstanceNorm with track_running_stats=True), "
                "which would differ from rank to rank; leave them out."
            )
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise UserError(
                f"{name} normalises by each batch in evaluation as well (track_running_stats=False), so that a "
                "sample's result depends on which others are beside it; let it track running statistics."
            )
    if checkpointing.mode == "none":
        return
    for name, block in find_blocks(model):
        if has_batch_norm(block):
            raise UserError(
                f"activation_checkpointing.mode={checkpointing.mode} runs the forward pass of {name} twice, whose "
                "batch normalisation would count each micro-batch twice; set activation_checkpointing.mode=none."
            )


def synchronize_batch_norm(module: nn.Module, group: dist.ProcessGroup | None, *, is_compiled: bool) -> None:
    """Make every batch normalisation in a module one over all ranks, in place; it must have its initial values.

    Args:
        module: its root.
        group: the ranks that read different data; None for one rank.
        is_compiled: whether what is around it will be compiled.
    """
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and not isinstance(norm, SynchronizedBatchNorm):
            norm.__class__ = SynchronizedBatchNorm
            assert isinstance(norm, SynchronizedBatchNorm)
            norm._group = group
            if is_compiled:
                # Its collectives break the graph in any case.
                norm.forward = torch.compiler.disable(norm.forward)  # type: ignore[method-assign]


class HeldBatchNorm(SynchronizedBatchNorm):
    """Batch normalisation that is in evaluation all the time: by its running statistics, which stay as they are."""

    _group = None

    def train(self, mode: bool = True) -> "HeldBatchNorm":
        """Stay in evaluation."""
        super().train(False)
        return self


def hold_statistics(model: nn.Module) -> None:
    """Make every batch normalisation all of whose parameters are frozen a held one, in place; one without any stays."""
    for norm in model.modules():
        own = list(norm.parameters(recurse=False))
        if isinstance(norm, _BatchNorm) and own and not any(parameter.requires_grad for parameter in own):
            norm.__class__ = HeldBatchNorm
            norm.eval()


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model's result for a sample depends on which others are beside it in training."""
    return any(_depends_on_batch(module) for module in model.modules())


def _depends_on_batch(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and not isinstance(module, HeldBatchNorm)


def batch_norm_group(model: nn.Module, mesh: ParallelMesh) -> dist.ProcessGroup | None:
    """A group of its own for the ranks that read different data, where the model needs one; every rank must call it.

    Its collectives lie among those of gradients, which leave at moments of their own.
    """
    if mesh.data.degree == 1 or not has_batch_norm(model):
        return None
    own = None
    all_peers = {tuple(mesh.dims.peers(rank, ("replicate", "shard"))) for rank in range(mesh.dims.world_size)}
    for peers in sorted(all_peers):
        group = dist.new_group(list(peers))
        if mesh.rank in peers:
            own = group
    return own
