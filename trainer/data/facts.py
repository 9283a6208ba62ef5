"""What a model and a task may know of the samples, before any is read and without torch."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SampleFacts:
    """What is known of all samples of a run.

    Attributes:
        sequence_length: tokens of a sample that the model computes on; None where samples have no one length.
        vocab_size: largest token id and one; None where samples are no tokens.
        eos_token_id: token that ends each document; None where there is none.
        tokenizer_dir: folder that ``AutoTokenizer.from_pretrained`` loads; None where there is none.
    """

    sequence_length: int | None = None
    vocab_size: int | None = None
    eos_token_id: int | None = None
    tokenizer_dir: Path | None = None
