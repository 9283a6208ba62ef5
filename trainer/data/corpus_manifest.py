"""What a prepared corpus says of itself; imports no torch."""

from typing import Self

from pydantic import Field, model_validator

from sharding.strict_model import StrictRecord
from trainer.data.shards import FileFacts, SplitFacts


class ConversationFacts(StrictRecord):
    """What became of conversations."""

    row_tokens: int | None
    """Tokens of the samples that conversations were packed into whole; None where they are one stream."""

    num_targets: dict[str, int]
    """Tokens of each split that are targets."""

    num_cut: int
    """Conversations of more than a sample's tokens, of which the beginning was kept."""

    num_without_target: int
    """Conversations that were dropped, since no token of them is a target."""

    num_divided: int
    """Conversations that became several documents, for the template writes earlier turns otherwise later."""


class CorpusManifest(StrictRecord):
    """What a prepared corpus says of itself."""

    preparation_version: int
    """Version of this layout and of the cleaning rules."""

    dtype: str = Field(pattern="^<u[24]$")
    """NumPy type of a token: `<u2` or `<u4`."""

    vocab_size: int
    """Largest token id of the tokenizer and one: more than its tokens where ids have gaps."""

    eos_token_id: int
    """Token that ends each document."""

    pad_token_id: int | None = None
    """Token that fills up rows; unknown in old corpora."""

    mask_token_id: int | None = None
    """Token that hides others; None where there is none, and in old corpora."""

    tokenizer_sha256: str
    """Fingerprint of the tokenizer."""

    corpus_sha256: str
    """SHA-256 of all cleaned documents in order."""

    python_version: str
    """Interpreter that prepared it; the embedded corpus depends on it."""

    num_documents_read: int
    """Documents in the source."""

    num_empty: int
    """Documents dropped for being empty."""

    num_duplicates: int
    """Documents dropped for being equal to an earlier one."""

    validation_limit: float | None = None
    """Documents are held out whose text's hash, as a share of all hashes, is below this; unknown in old corpora."""

    conversations: ConversationFacts | None = None
    """What became of conversations; None of texts."""

    tokenizer_files: list[FileFacts]
    """The tokenizer, its files named from the corpus folder."""

    splits: dict[str, SplitFacts]
    """`train` and `validation`."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.splits.keys() != {"train", "validation"}:
            raise ValueError(f"its splits are {', '.join(self.splits)}")
        for name, split in self.splits.items():
            num_bytes = sum(shard.num_bytes for shard in split.shards)
            if num_bytes != split.num_tokens * int(self.dtype[-1]):
                raise ValueError(f"the shards of {name} do not have {split.num_tokens} tokens")
        return self
