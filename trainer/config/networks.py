"""Arguments of the built-in networks, and the rules of the section ``model``; imports no torch."""

from typing import Literal

from pydantic import Field, ValidationError

from sharding.ranks.errors import UserError
from sharding.strict_model import StrictModel
from trainer.config.sections import ModelConfig
from trainer.config.setting_hints import setting_hint

Activation = Literal["relu", "leaky-relu", "prelu", "gelu"]
"""``prelu`` learns one slope for each layer."""


class LayerArguments(StrictModel):
    """What the hidden layers of every built-in network have."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability that an element of a hidden layer is set to 0 in training."""

    batch_norm: bool = False
    """Normalise each channel of a hidden layer over the rows of all ranks' micro-batches, before the activation."""

    activation: Activation = "relu"
    """Function between layers."""


class MlpArguments(LayerArguments):
    """``mlp``: fully connected layers over a table's features, an image's pixels, or a recording's samples."""

    hidden_sizes: list[int] = Field(default=[128, 128])
    """Width of each hidden layer; none makes the model linear."""


class EmbeddingMlpArguments(MlpArguments):
    """``embedding-mlp``: an embedding of each categorical column, beside the features if there are any, into an mlp."""

    embedding_size: int = Field(default=16, ge=1)
    """Width of each column's embedding; a value that training has not seen has zeros."""


class CnnArguments(LayerArguments):
    """``cnn``: convolutions over images (2-D) or recordings (1-D), each with a pooling, and hidden layers behind."""

    channels: list[int] = Field(default=[32, 64], min_length=1)
    """Channels of each convolution."""

    kernel_size: int = Field(default=3, ge=1)
    """Width of the convolutions, odd, so that they keep the size of what they are given."""

    pool_size: int = Field(default=2, ge=1)
    """Positions along each dimension of which each pooling keeps the largest; 1 keeps all."""

    hidden_sizes: list[int] = Field(default=[])
    """Width of each fully connected layer behind the convolutions."""


class LstmArguments(StrictModel):
    """``lstm``: embedding and (bidirectional) LSTM over a text's tokens, mean and maximum over its positions."""

    embedding_size: int = Field(default=64, ge=1)
    """Width of a token's embedding."""

    hidden_size: int = Field(default=96, ge=1)
    """Width of each direction of each layer."""

    num_layers: int = Field(default=1, ge=1)
    """Recurrent layers, one on top of the other."""

    bidirectional: bool = True
    """Read each text from its end, too."""

    mean_embedding: bool = True
    """Show the head the mean of the tokens' embeddings beside what the recurrent layers found."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability that an element of an embedding or of the head's input is set to 0 in training."""


NETWORKS: dict[str, type[StrictModel]] = {
    "mlp": MlpArguments,
    "cnn": CnnArguments,
    "lstm": LstmArguments,
    "embedding-mlp": EmbeddingMlpArguments,
}
"""The arguments of each built-in network."""

_KINDS = ("architecture", "pretrained", "builtin", "factory")
_TASKS_OF_TOKENS = ("causal-lm", "masked-lm", "token-classification")


def network_arguments(model: ModelConfig) -> StrictModel:
    """The arguments of a built-in network.

    Raises:
        UserError: one is unknown or has a wrong value; every problem is named.
    """
    kind = NETWORKS[str(model.builtin)]
    try:
        arguments = kind.model_validate(model.arguments)
    except ValidationError as error:
        problems = [
            _describe(model, kind, [str(part) for part in e["loc"]], e["type"], e["msg"]) for e in error.errors()
        ]
        raise UserError("\n".join(problems)) from None
    sizes = [size for name in ("hidden_sizes", "channels") for size in getattr(arguments, name, [])]
    if any(size < 1 for size in sizes):
        raise UserError(f"model.arguments={model.arguments}: a layer has at least 1 element; write sizes above 0.")
    if isinstance(arguments, CnnArguments) and arguments.kernel_size % 2 == 0:
        raise UserError(
            f"model.arguments.kernel_size={arguments.kernel_size} has no middle; write an odd number, "
            f"{arguments.kernel_size + 1} say."
        )
    return arguments


def validate_model(model: ModelConfig, task_name: str) -> None:
    """Every rule that spans settings of the model, and what a task can never do with it.

    Raises:
        UserError: a rule is broken.
    """
    given = [kind for kind in _KINDS if getattr(model, kind) is not None]
    if len(given) != 1:
        found = " and ".join(f"model.{kind}={getattr(model, kind)}" for kind in given) or "the model is not named"
        raise UserError(
            f"{found}: set exactly one of model.architecture, model.pretrained, model.builtin and model.factory."
        )
    if model.factory is not None and not all(model.factory.partition(":")):
        raise UserError(f"model.factory={model.factory} is not module:function, such as my_models:make_model.")
    if model.builtin is None:
        return
    network_arguments(model)
    if task_name in _TASKS_OF_TOKENS:
        raise UserError(
            f"model.builtin={model.builtin} predicts one thing of each sample, but task.name={task_name} one of each "
            "token; choose model.architecture, or a task that classifies samples."
        )


def _describe(model: ModelConfig, kind: type[StrictModel], place: list[str], problem: str, message: str) -> str:
    key = ".".join(("model.arguments", *place))
    if problem == "extra_forbidden":
        return f"{key} is no argument of model.builtin={model.builtin}{setting_hint(place, kind)}"
    value = model.arguments.get(place[0]) if place else model.arguments
    return f"{key}={value!r}: {message[:1].lower()}{message[1:]}."
