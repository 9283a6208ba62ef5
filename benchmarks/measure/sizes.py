"""Models that benchmarks train, by name: a configuration and changes to it. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sharding.ranks.errors import UserError

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUICKSTART = _CONFIGS / "quickstart.yaml"


@dataclass(frozen=True)
class Size:
    """A model and its batch.

    Attributes:
        config: file that it starts from.
        overrides: changes to it.
        needs_gpu: whether a CPU would take hours for it.
        has_own_batch: whether the file's ``batch.global_size`` holds; else it is two micro-batches of each rank.
    """

    config: Path
    overrides: tuple[str, ...] = ()
    needs_gpu: bool = False
    has_own_batch: bool = False


# Any text will do where only time counts, and this one is always there; the vocabulary is the model's own all the same.
_LOCAL_TEXT = ("data.source=python-stdlib", "data.hub_name=null", "data.tokenizer=train-bpe", "data.vocab_size=2048")

SIZES: dict[str, Size] = {
    # So little arithmetic that what a step costs is mostly what the host does around it.
    "tiny": Size(
        QUICKSTART,
        (
            "model.config.hidden_size=64",
            "model.config.intermediate_size=128",
            "model.config.num_hidden_layers=2",
            "model.config.num_attention_heads=2",
            "model.config.num_key_value_heads=2",
            "data.sequence_length=32",
            "batch.micro_size=2",
            "optimizer.lr=1e-3",
        ),
    ),
    # The quickstart's model on an eighth of its tokens: communication weighs eight times as much.
    "short": Size(QUICKSTART, ("data.sequence_length=128", "batch.micro_size=1")),
    "quickstart": Size(QUICKSTART),
    "gpt2-124m": Size(
        _CONFIGS / "gpt2_124m.yaml",
        (*_LOCAL_TEXT, "data.hub_config=null", "data.validation_fraction=0.02", "model.config.vocab_size=50257"),
        needs_gpu=True,
    ),
    # The shape of Llama 3.2 1B.
    "llama-1b": Size(
        _CONFIGS / "llama_1b.yaml",
        (*_LOCAL_TEXT, "data.hub_config=null", "data.validation_fraction=0.02", "model.config.vocab_size=128256"),
        needs_gpu=True,
    ),
}
"""What ``--size`` may be."""


def size_named(name: str, *, has_gpu: bool, choices: Sequence[str] = tuple(SIZES)) -> Size:
    """A size by its name.

    Args:
        name: what was asked for.
        has_gpu: whether there is a GPU.
        choices: names that the benchmark knows.

    Raises:
        UserError: there is none of that name, or it needs a GPU.
    """
    if name not in choices:
        raise UserError(f"--size {name}: there is no such size; there are {', '.join(choices)}.")
    if SIZES[name].needs_gpu and not has_gpu:
        raise UserError(f"--size {name} needs a GPU, and torch sees none; use --size quickstart.")
    return SIZES[name]
