"""Output projection and cross-entropy, some positions at a time, so that the logits of all never exist at once."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from trainer.runtime.compiled_by_shape import compiled_by_shape
from trainer.tasks.next_tokens import IGNORED_LABEL

_ROWS_AT_ONCE = 4096
"""Rows of the projection's gradient whose product in 16 bits exists beside the sum."""


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
    _settings: "_Settings"

    @classmethod
    def take_over(cls, projection: nn.Linear, chunk_tokens: int, z_loss: float, *, is_compiled: bool = False) -> None:
        """Make a projection one of these.

        Args:
            projection: hidden states to logits.
            chunk_tokens: positions whose logits exist at once.
            z_loss: see ``CausalLanguageModelling``; training only.
            is_compiled: whether projection and loss of a chunk are compiled together in training, once for each shape.
        """
        projection.__class__ = cls
        assert isinstance(projection, cls)
        projection.targets = projection.position = projection.last_loss = None
        projection._settings = _Settings(chunk_tokens, z_loss, is_compiled)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [micro, length, vocabulary] from hidden states [micro, length, hidden]; with targets the summed loss.

        The loss is an fp32 scalar in nats, z-loss included in training.
        """
        if self.targets is None:
            position, self.position = self.position, None
            return super().forward(input if position is None else input[:, position, None])
        labels, self.targets = self.targets, None
        settings = self._settings if self.training else self._settings._replace(z_loss=0.0)
        loss: torch.Tensor = _ChunkedLoss.apply(
            input, self.weight, self.bias, labels, settings, torch.is_grad_enabled()
        )
        self.last_loss = loss.detach()
        return loss


class _Settings(NamedTuple):
    """See ``ChunkedLossHead.take_over``."""

    chunk_tokens: int
    z_loss: float
    is_compiled: bool


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
        settings: _Settings,
        has_gradient: bool,
    ) -> torch.Tensor:
        rows, targets = hidden.flatten(0, -2), labels.flatten()
        total = torch.zeros((), device=hidden.device)
        chunk_loss = compiled_chunk_loss() if settings.is_compiled and has_gradient else _chunk_loss
        of_hidden, of_weight, of_bias, *_ = (needed and has_gradient for needed in ctx.needs_input_grad)
        chunks = range(0, len(rows), settings.chunk_tokens)
        d_weight = _SumOfProducts(weight, len(chunks)) if of_weight else None
        # A sum over chunks, in fp32 whatever the products are computed in.
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if of_bias and bias is not None else None
        d_rows = torch.empty_like(rows) if of_hidden else None
        needs_gradient = of_hidden or d_weight is not None or d_bias is not None
        for start in chunks:
            part = rows[start : start + settings.chunk_tokens].to(weight.dtype)
            target = targets[start : start + settings.chunk_tokens]
            loss, d_logits = chunk_loss(part, weight, bias, target, settings.z_loss, needs_gradient)
            total += loss
            if d_logits is None:
                continue
            # Positions without a target are left out of the products, whose other side is the narrow one.
            counted = (target != IGNORED_LABEL)[:, None].to(weight.dtype)
            if d_rows is not None:
                d_rows[start : start + settings.chunk_tokens] = (d_logits @ weight) * counted
            if d_weight is not None:
                d_weight.add(d_logits, part * counted)
            if d_bias is not None:
                d_bias += (d_logits * counted).sum(dim=0)
        ctx.gradients = (
            None if d_rows is None else d_rows.view_as(hidden),
            None if d_weight is None else d_weight.total.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *factors: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = tuple(None if gradient is None else gradient.mul_(factors[0]) for gradient in ctx.gradients)
        # They are used up: a second backward pass would scale them twice.
        ctx.gradients = None
        return (*scaled, None, None, None)


def _chunk_loss(
    part: torch.Tensor,
    matrix: torch.Tensor,
    offset: torch.Tensor | None,
    target: torch.Tensor,
    z_loss: float,
    needs_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The summed loss of a chunk, an fp32 scalar, and its gradient by the logits, [chunk, vocabulary] in their format.

    The gradient is right at positions with a target alone.

    Args:
        part: hidden states, [chunk, hidden].
        matrix: [vocabulary, hidden].
        offset: [vocabulary].
        target: int64 [chunk].
        z_loss: its coefficient.
        needs_gradient: whether there is one.
    """
    is_target, index = target != IGNORED_LABEL, target.clamp(min=0)[:, None]
    logits = functional.linear(part, matrix, offset).float()
    log_p = logits.log_softmax(dim=-1)
    losses = -log_p.gather(-1, index)[:, 0]
    log_z = (logits[:, :1] - log_p[:, :1]) if z_loss else None
    if log_z is not None:
        losses = losses + z_loss * log_z[:, 0].square()
    total = torch.where(is_target, losses, 0.0).sum()
    if not needs_gradient:
        return total, None
    d_logits = log_p.exp() if torch.compiler.is_compiling() else log_p.exp_()
    if log_z is not None:
        d_logits *= 1 + 2 * z_loss * log_z
    if torch.compiler.is_compiling():
        # In one pass with the rest, which a scatter would end.
        is_index = torch.arange(logits.shape[-1], device=index.device) == index
        d_logits = torch.where(is_index, d_logits - 1.0, d_logits)
    else:
        d_logits.scatter_add_(-1, index, d_logits.new_full(index.shape, -1.0))
    return total, d_logits.to(part.dtype)


@functools.cache
def compiled_chunk_loss(backend: str = "inductor") -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """``_chunk_loss`` compiled by a backend of ``torch.compile``, for each shape by itself.

    So the last chunk, which may be shorter, has numbers that do not depend on which shape came first.
    """
    return compiled_by_shape(_chunk_loss, backend)


class _SumOfProducts:
    """The sum over chunks of gradients by the weight, in fp32, or as it is where there is one chunk.

    Attributes:
        total: [vocabulary, hidden], once something was added.
    """

    def __init__(self, weight: torch.Tensor, num_chunks: int) -> None:
        self._is_one = num_chunks == 1
        self._is_exact = weight.dtype is torch.float32
        if not self._is_one:
            self.total = torch.zeros_like(weight, dtype=torch.float32)

    def add(self, d_logits: torch.Tensor, part: torch.Tensor) -> None:
        """Add a chunk's: gradients by its logits, [chunk, vocabulary], and its hidden states, [chunk, hidden]."""
        if self._is_one:
            self.total = d_logits.T @ part
        elif self._is_exact:
            self.total.addmm_(d_logits.T, part)
        else:
            # A product of all rows would be as large as the gradient, for each chunk anew.
            for row in range(0, len(self.total), _ROWS_AT_ONCE):
                self.total[row : row + _ROWS_AT_ONCE] += d_logits[:, row : row + _ROWS_AT_ONCE].T @ part
