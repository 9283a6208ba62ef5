"""Layers that the built-in networks are made of."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from trainer.config.networks import Activation, LayerArguments

_ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "gelu": nn.GELU,
}


class DenseLayer(nn.Module):
    """A fully connected layer, [n, inputs] to [n, outputs]: normalisation, activation, dropout."""

    def __init__(self, num_inputs: int, num_outputs: int, arguments: LayerArguments) -> None:
        """Say how wide it is, and what follows the product."""
        super().__init__()
        # Normalisation takes a constant away again.
        self.linear = nn.Linear(num_inputs, num_outputs, bias=not arguments.batch_norm)
        self.norm = nn.BatchNorm1d(num_outputs) if arguments.batch_norm else nn.Identity()
        self.activation = _ACTIVATIONS[arguments.activation]()
        self.dropout = nn.Dropout(arguments.dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """One layer's output."""
        output: torch.Tensor = self.dropout(self.activation(self.norm(self.linear(hidden))))
        return output


class Convolution(nn.Module):
    """A convolution over images, [n, channels, height, width], or recordings, [n, channels, samples], and a pooling."""

    def __init__(
        self, num_inputs: int, num_outputs: int, sizes: Sequence[int], arguments: LayerArguments, kernel: int, pool: int
    ) -> None:
        """Say how many channels it has.

        Args:
            num_inputs: channels that it is given.
            num_outputs: channels that it makes.
            sizes: of what it is given, without channels; each at least ``pool``.
            arguments: what follows the product.
            kernel: width, odd.
            pool: positions of which the largest is kept, along each dim.
        """
        super().__init__()
        is_image = len(sizes) == 2
        convolution, norm = (nn.Conv2d, nn.BatchNorm2d) if is_image else (nn.Conv1d, nn.BatchNorm1d)
        bias = not arguments.batch_norm
        self.convolution = convolution(num_inputs, num_outputs, kernel, padding=kernel // 2, bias=bias)
        self.norm = norm(num_outputs) if arguments.batch_norm else nn.Identity()
        self.activation = _ACTIVATIONS[arguments.activation]()
        self.pool = (nn.MaxPool2d if is_image else nn.MaxPool1d)(pool)
        self.dropout = nn.Dropout(arguments.dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Each size divided by ``pool``, rounded down."""
        output: torch.Tensor = self.dropout(self.pool(self.activation(self.norm(self.convolution(hidden)))))
        return output


class CategoryEmbedding(nn.Embedding):
    """An embedding of a categorical column, [n] to [n, width], whose index 0 is a value that training has not seen."""

    def reset_parameters(self) -> None:
        """Small values, and none at all for what was not seen, which so says nothing."""
        nn.init.normal_(self.weight, std=0.1)
        with torch.no_grad():
            self.weight[0] = 0.0


class TokenEmbedding(nn.Embedding):
    """An embedding of tokens, [n, length] to [n, length, width], that begins small.

    At torch's standard deviation of 1, what a rare token began with outweighs what a few thousand texts teach of it.
    """

    def reset_parameters(self) -> None:
        """Small values."""
        nn.init.normal_(self.weight, std=0.1)


class RecurrentLayer(nn.Module):
    """An LSTM over texts, [n, length, inputs] to [n, length, outputs], that reads each one from its own end as well.

    torch's bidirectional LSTM begins with the padding behind a shorter text, and what it finds there depends on how
    long the longest text of the batch is.
    """

    def __init__(self, num_inputs: int, num_outputs: int, *, bidirectional: bool) -> None:
        """Say how wide it is; ``num_outputs`` of each direction."""
        super().__init__()
        self.onwards = nn.LSTM(num_inputs, num_outputs, batch_first=True)
        self.backwards = nn.LSTM(num_inputs, num_outputs, batch_first=True) if bidirectional else None

    def forward(self, hidden: torch.Tensor, reversed_positions: torch.Tensor) -> torch.Tensor:
        """States at each position.

        Args:
            hidden: what is read.
            reversed_positions: see ``reversed_within_text``.
        """
        states: torch.Tensor = self.onwards(hidden)[0]
        if self.backwards is None:
            return states
        from_end = self.backwards(_in_order(hidden, reversed_positions))[0]
        return torch.cat([states, _in_order(from_end, reversed_positions)], dim=-1)


def reversed_within_text(mask: torch.Tensor) -> torch.Tensor:
    """Each text's positions from its last to its first, and those of the padding as they are; int64 [n, length].

    Args:
        mask: 1 at tokens and 0 at the padding behind them, [n, length].
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask > 0, mask.sum(dim=1, keepdim=True) - 1 - positions, positions)


def _in_order(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
