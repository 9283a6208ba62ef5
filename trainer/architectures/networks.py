"""The built-in networks, and models of the user's own."""

import inspect
import math
from itertools import pairwise

import torch
from torch import nn

from sharding.ranks.errors import UserError
from trainer.architectures.layers import (
    CategoryEmbedding,
    Convolution,
    DenseLayer,
    RecurrentLayer,
    TokenEmbedding,
    reversed_within_text,
)
from trainer.config.networks import (
    CnnArguments,
    EmbeddingMlpArguments,
    LstmArguments,
    MlpArguments,
    network_arguments,
)
from trainer.config.sections import ModelConfig
from trainer.data.facts import SampleFacts
from trainer.runtime.own_modules import import_own


def build_network(settings: ModelConfig, facts: SampleFacts, num_outputs: int | None) -> nn.Module:
    """A built-in network, or what ``model.factory`` makes, on torch's current default device.

    Its forward pass takes columns of a batch by name (``features``, ``pixel_values`` ...); that of a built-in network
    gives [n, num_outputs].

    Args:
        settings: the section ``model``, with ``builtin`` or ``factory``.
        facts: of the samples.
        num_outputs: predictions for each sample; None where the task has no such number.

    Raises:
        UserError: the samples are not what the network reads, it is too small for it, or a factory cannot be called.
    """
    if settings.factory is not None:
        return _made_by_factory(settings, facts, num_outputs)
    if num_outputs is None:
        raise UserError(
            f"model.builtin={settings.builtin} needs a number of predictions for each sample, which the task does not "
            "have; name a task that classifies samples or predicts numbers, or make the model by model.factory."
        )
    arguments = network_arguments(settings)
    # From the one with the most settings on: an embedding-mlp's are an mlp's and one more.
    if isinstance(arguments, EmbeddingMlpArguments):
        return EmbeddingMlp(arguments, facts, num_outputs)
    if isinstance(arguments, MlpArguments):
        return Mlp(arguments, facts, num_outputs)
    if isinstance(arguments, CnnArguments):
        return Cnn(arguments, facts, num_outputs)
    assert isinstance(arguments, LstmArguments), "these are all that there are"
    return Lstm(arguments, facts, num_outputs)


class Mlp(nn.Module):
    """Fully connected layers over a table's features, the pixels of images or the samples of recordings."""

    def __init__(self, arguments: MlpArguments, facts: SampleFacts, num_outputs: int) -> None:
        """Find out what samples are.

        Raises:
            UserError: they are none of these.
        """
        super().__init__()
        if facts.categories:
            raise _cannot_read("mlp", f"the categorical column {facts.categories[0][0]}", "embedding-mlp")
        num_inputs = _num_dense(facts)
        if not num_inputs:
            raise _cannot_read("mlp", "texts" if facts.vocab_size else "these samples", "lstm")
        self.layers = _dense_layers(num_inputs, arguments)
        self.head = nn.Linear([num_inputs, *arguments.hidden_sizes][-1], num_outputs)

    def forward(
        self,
        features: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predictions, [n, outputs], from the one column that samples have."""
        hidden = next(column for column in (features, pixel_values, input_values) if column is not None).flatten(1)
        for layer in self.layers:
            hidden = layer(hidden)
        output: torch.Tensor = self.head(hidden)
        return output


class EmbeddingMlp(nn.Module):
    """An embedding of each categorical column beside a table's features, and fully connected layers over them."""

    def __init__(self, arguments: EmbeddingMlpArguments, facts: SampleFacts, num_outputs: int) -> None:
        """Find out which columns there are.

        Raises:
            UserError: there is no categorical one.
        """
        super().__init__()
        if not facts.categories:
            raise _cannot_read("embedding-mlp", "samples without categorical columns", "mlp")
        size = arguments.embedding_size
        self.embeddings = nn.ModuleList([CategoryEmbedding(num_values, size) for _, num_values in facts.categories])
        num_inputs = size * len(facts.categories) + (facts.num_features or 0)
        self.layers = _dense_layers(num_inputs, arguments)
        self.head = nn.Linear([num_inputs, *arguments.hidden_sizes][-1], num_outputs)

    def forward(self, categories: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
        """Predictions, [n, outputs], from indices [n, columns] and features [n, features]."""
        columns = [embedding(categories[:, index]) for index, embedding in enumerate(self.embeddings)]
        hidden = torch.cat(columns if features is None else [*columns, features], dim=-1)
        for layer in self.layers:
            hidden = layer(hidden)
        output: torch.Tensor = self.head(hidden)
        return output


class Cnn(nn.Module):
    """Convolutions over images, whose result is read position by position, or over recordings, as a mean over time."""

    def __init__(self, arguments: CnnArguments, facts: SampleFacts, num_outputs: int) -> None:
        """Find out what samples are.

        Raises:
            UserError: they are neither, or too small for so many poolings.
        """
        super().__init__()
        if facts.image_shape is not None:
            num_inputs, *sizes = facts.image_shape
        elif facts.num_audio_samples is not None:
            num_inputs, sizes = 1, [facts.num_audio_samples]
        else:
            raise _cannot_read("cnn", "samples that are neither images nor recordings", "mlp")
        self.is_image = len(sizes) == 2
        self.convolutions = nn.ModuleList()
        first_sizes, pool = sizes, arguments.pool_size
        for inputs, outputs in pairwise([num_inputs, *arguments.channels]):
            if min(sizes) < pool:
                raise UserError(
                    f"model.arguments.channels={arguments.channels} with pool_size={pool} divides samples of "
                    f"{' x '.join(map(str, first_sizes))} by {pool} for each convolution, {len(arguments.channels)} "
                    "times, until nothing is left; name fewer channels, or a smaller pool_size."
                )
            self.convolutions.append(Convolution(inputs, outputs, sizes, arguments, arguments.kernel_size, pool))
            sizes = [size // pool for size in sizes]
        num_flat = arguments.channels[-1] * (math.prod(sizes) if self.is_image else 1)
        self.layers = _dense_layers(num_flat, arguments)
        self.head = nn.Linear([num_flat, *arguments.hidden_sizes][-1], num_outputs)

    def forward(
        self, pixel_values: torch.Tensor | None = None, input_values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predictions, [n, outputs], from images [n, channels, height, width] or recordings [n, samples]."""
        if pixel_values is not None:
            hidden = pixel_values
        else:
            assert input_values is not None, "samples are images or recordings"
            hidden = input_values[:, None]
        for convolution in self.convolutions:
            hidden = convolution(hidden)
        hidden = hidden.flatten(1) if self.is_image else hidden.mean(dim=-1)
        for layer in self.layers:
            hidden = layer(hidden)
        output: torch.Tensor = self.head(hidden)
        return output


class Lstm(nn.Module):
    """Embedding and LSTM over texts, whose states' mean and maximum are read, and the mean embedding beside them.

    The mean embedding carries most of what short texts say, and is learnt in a fraction of the steps.
    """

    def __init__(self, arguments: LstmArguments, facts: SampleFacts, num_outputs: int) -> None:
        """Find out how many tokens there are.

        Raises:
            UserError: samples are no texts.
        """
        super().__init__()
        if facts.vocab_size is None:
            raise _cannot_read("lstm", "samples that are no texts", "mlp")
        width = arguments.hidden_size * (2 if arguments.bidirectional else 1)
        embedded = arguments.embedding_size
        self.embedding = TokenEmbedding(facts.vocab_size, embedded)
        self.dropout = nn.Dropout(arguments.dropout)
        self.layers = nn.ModuleList(
            [
                RecurrentLayer(inputs, arguments.hidden_size, bidirectional=arguments.bidirectional)
                for inputs in [embedded, *[width] * (arguments.num_layers - 1)]
            ]
        )
        self.has_mean_embedding = arguments.mean_embedding
        self.head = nn.Linear(2 * width + (embedded if arguments.mean_embedding else 0), num_outputs)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Predictions, [n, outputs], from token ids and a mask that is 0 at the padding behind them, [n, length]."""
        embedded = self.dropout(self.embedding(input_ids))
        reversed_positions = reversed_within_text(attention_mask)
        hidden = embedded
        for layer in self.layers:
            hidden = layer(hidden, reversed_positions)
        is_token = attention_mask[..., None] > 0
        # A state is above -1.
        found = [_mean(hidden, is_token), torch.where(is_token, hidden, -1.0).amax(dim=1)]
        if self.has_mean_embedding:
            found.append(_mean(embedded, is_token))
        output: torch.Tensor = self.head(self.dropout(torch.cat(found, dim=-1)))
        return output


def _dense_layers(num_inputs: int, arguments: MlpArguments | CnnArguments) -> nn.ModuleList:
    widths = [num_inputs, *arguments.hidden_sizes]
    return nn.ModuleList([DenseLayer(inputs, outputs, arguments) for inputs, outputs in pairwise(widths)])


def _mean(states: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """The mean over each text's tokens, [n, width], added up in fp32; zeros for a text without one."""
    total = torch.where(is_token, states, 0.0).float().sum(dim=1)
    return (total / is_token.sum(dim=1).clamp(min=1)).to(states.dtype)


def _num_dense(facts: SampleFacts) -> int:
    """Numbers of a sample that are read as they are."""
    if facts.image_shape is not None:
        return math.prod(facts.image_shape)
    return facts.num_audio_samples or facts.num_features or 0


def _cannot_read(builtin: str, samples: str, other: str) -> UserError:
    return UserError(f"model.builtin={builtin} does not read {samples}; choose another, model.builtin={other} say.")


def _made_by_factory(settings: ModelConfig, facts: SampleFacts, num_outputs: int | None) -> nn.Module:
    name = str(settings.factory)
    make = import_own(name, "model.factory", settings.folder)
    given = {"facts": facts, "num_outputs": num_outputs, **settings.arguments}
    try:
        inspect.signature(make).bind(**given)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"model.factory={name} cannot be called with {', '.join(given)} ({error}); write def "
            f"{name.partition(':')[2]}(*, facts, num_outputs, **arguments), with model.arguments as arguments."
        ) from None
    model = make(**given)
    if not isinstance(model, nn.Module):
        raise UserError(f"model.factory={name} made {type(model).__name__}, which is no torch.nn.Module; return one.")
    return model
