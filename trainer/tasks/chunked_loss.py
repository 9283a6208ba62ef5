"""Output projection and cross-entropy, some positions at a time, so that the logits of all never exist at once."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trainer.tasks.next_tokens import IGNORED_LABEL


class ChunkedLossHead(nn.Linear):
    """An output projection that computes the loss itself where it was given targets.

    An existing ``nn.Linear`` becomes one by its class: parameters, their names and what they are tied to stay. The loss
    is computed inside the module's own forward pass, where every strategy has its parameters at hand.

    Attributes:
        targets: labels of the next forward pass, int64 [micro, length] with -100 where there is no target, which uses
            them up; None for logits.
        position: the one position whose logits the next forward pass gives, an int64 scalar, which uses it up; None for
            all.
        last_loss: what the last forward pass with targets gave, an fp32 scalar, detached.
    """

    targets: torch.Tensor | None
    position: torch.Tensor | None
    last_loss: torch.Tensor | None
    _chunk_tokens: int
    _z_loss: float

    @classmethod
    def take_over(cls, projection: nn.Linear, chunk_tokens: int, z_loss: float) -> None:
        """Make a projection one of these.

        Args:
            projection: hidden states to logits.
            chunk_tokens: positions whose logits exist at once.
            z_loss: see ``CausalLanguageModelling``; training only.
        """
        projection.__class__ = cls
        assert isinstance(projection, cls)
        projection.targets = projection.position = projection.last_loss = None
        projection._chunk_tokens, projection._z_loss = chunk_tokens, z_loss

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [micro, length, vocabulary] from hidden states [micro, length, hidden]; with targets the summed loss.

        The loss is an fp32 scalar in nats, z-loss included in training.
        """
        if self.targets is None:
            position, self.position = self.position, None
            return super().forward(input if position is None else input[:, position, None])
        labels, self.targets = self.targets, None
        z_loss = self._z_loss if self.training else 0.0
        loss: torch.Tensor = _ChunkedLoss.apply(
            input, self.weight, self.bias, labels, self._chunk_tokens, z_loss, torch.is_grad_enabled()
        )
        self.last_loss = loss.detach()
        return loss


class _ChunkedLoss(torch.autograd.Function):
    """Sum of cross-entropies, with gradients made in the forward pass: a chunk's logits are needed once.

    Hidden states are [micro, length, hidden], the weight [vocabulary, hidden], labels int64 [micro, length]; the sum is
    an fp32 scalar in nats. The arithmetic is that of projection and ``cross_entropy`` one after the other; backward
    only scales. What is frozen has none. As in Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training"
    (2024), section 3.2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        chunk_tokens: int,
        z_loss: float,
        has_gradient: bool,
    ) -> torch.Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        rows, targets = hidden.flatten(0, -2), labels.flatten()
        total = torch.zeros((), device=hidden.device)
        with torch.autocast(device, enabled=False):
            matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            # Sums over chunks, in fp32 whatever the products are computed in.
            of_hidden, of_weight, of_bias, *_ = (needed and has_gradient for needed in ctx.needs_input_grad)
            d_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
            d_bias = torch.zeros_like(bias, dtype=torch.float32) if of_bias and bias is not None else None
            d_rows = torch.empty_like(rows) if of_hidden else None
            for start in range(0, len(rows), chunk_tokens):
                part = rows[start : start + chunk_tokens].to(dtype)
                target = targets[start : start + chunk_tokens]
                is_target, index = target != IGNORED_LABEL, target.clamp(min=0)[:, None]
                logits = functional.linear(part, matrix, offset).float()
                log_p = logits.log_softmax(dim=-1)
                losses = -log_p.gather(-1, index)[:, 0]
                log_z = (logits[:, :1] - log_p[:, :1]) if z_loss else None
                if log_z is not None:
                    losses = losses + z_loss * log_z[:, 0].square()
                total += torch.where(is_target, losses, 0.0).sum()
                if d_rows is None and d_weight is None and d_bias is None:
                    continue
                d_logits = log_p.exp_()
                if log_z is not None:
                    d_logits *= 1 + 2 * z_loss * log_z
                d_logits.scatter_add_(-1, index, d_logits.new_full(index.shape, -1.0))
                d_logits = d_logits.to(dtype)
                # Positions without a target are left out of the products, whose other side is the narrow one.
                counted = is_target[:, None].to(dtype)
                if d_rows is not None:
                    d_rows[start : start + chunk_tokens] = (d_logits @ matrix) * counted
                if d_weight is not None and dtype is torch.float32:
                    d_weight.addmm_(d_logits.T, part * counted)
                elif d_weight is not None:
                    d_weight += d_logits.T @ (part * counted)
                if d_bias is not None:
                    d_bias += (d_logits * counted).sum(dim=0)
        ctx.gradients = (
            None if d_rows is None else d_rows.view_as(hidden),
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *factors: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = tuple(None if gradient is None else gradient.mul_(factors[0]) for gradient in ctx.gradients)
        # They are used up: a second backward pass would scale them twice.
        ctx.gradients = None
        return (*scaled, None, None, None, None)
