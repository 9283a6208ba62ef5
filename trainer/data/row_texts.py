"""Texts as rows of tokens."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sharding.ranks.errors import UserError
from trainer.config.data import DataConfig
from trainer.data.clean import encode_text
from trainer.data.row_encoder import RowEncoder
from trainer.data.row_kinds import RowCounts
from trainer.data.row_sources import RawRow, no_column
from trainer.data.rows_manifest import RowRecipe
from trainer.data.tokenizer import (
    TRAINED,
    load_tokenizer,
    text_encoder,
    tokenizer_fingerprint,
    train_byte_level_bpe,
    vocabulary_size,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerFast


class TextRows:
    """Texts, each with a label, or each of words with a tag."""

    def __init__(self, config: DataConfig) -> None:
        """Load the tokenizer, if one is named.

        Raises:
            UserError: it cannot be loaded.
        """
        self.counts = RowCounts()
        self._config = config
        self._has_tags = config.label_kind == "tags"
        self.tokenizer: PreTrainedTokenizerFast | None = None
        if config.tokenizer != TRAINED:
            self.tokenizer = load_tokenizer(config.tokenizer, masks=config.mask_token, packs=False)
        self._encoder: RowEncoder | None = None

    def payload(self, row: RawRow) -> bytes | None:
        """See RowKind: UTF-8, of words a JSON list.

        Raises:
            UserError: there is no such column, or it holds something else.
        """
        column = self._config.text_field
        if column not in row.values:
            raise no_column("data.text_field", column, row)
        value = row.values[column]
        if self._has_tags:
            if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
                raise UserError(
                    f"data.text_field={column}: {row.place} has no list of words, which data.label_kind=tags needs; "
                    "name another column."
                )
            words = [encode_text(word, self._config.normalize).decode() for word in value]
            return json.dumps(words).encode() if words else None
        if value is not None and not isinstance(value, str):
            raise UserError(f"data.text_field={column}: {row.place} is not text; name another column.")
        text = encode_text(value or "", self._config.normalize)
        return text if text.strip() else None

    def learn(self, payloads: Iterator[bytes], recipe: RowRecipe) -> RowRecipe:
        """See RowKind."""
        if self.tokenizer is None:
            texts = (" ".join(json.loads(p)) if self._has_tags else p.decode() for p in payloads)
            self.tokenizer = train_byte_level_bpe(texts, self._config.vocab_size, masks=self._config.mask_token)
        tokenizer = self.tokenizer
        self.use(tokenizer)
        return recipe.model_copy(
            update={
                "sequence_length": self._config.sequence_length,
                "vocab_size": vocabulary_size(tokenizer),
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                "mask_token_id": tokenizer.mask_token_id,
                "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
            }
        )

    def use(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        """Encode by a tokenizer that was learnt before."""
        self.tokenizer, self._encoder = tokenizer, RowEncoder(text_encoder(tokenizer), has_tags=self._has_tags)

    def columns(self, payloads: list[bytes], recipe: RowRecipe) -> "dict[str, pa.Array]":
        """See RowKind; ``input_ids`` int32, and of words ``word_starts``: the first token of each, -1 if it has none.

        A tokenizer puts its own tokens around a text, as models were trained with them.
        """
        import pyarrow as pa

        assert self._encoder is not None, "there is a tokenizer"
        texts = [json.loads(payload) if self._has_tags else payload.decode() for payload in payloads]
        encoded = self._encoder.encode(texts, recipe.sequence_length)
        empty = next((text for text, row in zip(texts, encoded, strict=True) if not row.ids), None)
        if empty is not None:
            raise UserError(
                f"data.text_field={self._config.text_field}: {str(empty)[:40]!r} is a text without a token for "
                f"data.tokenizer={self._config.tokenizer}; remove the row."
            )
        self.counts.num_truncated += sum(row.is_truncated for row in encoded)
        integers = pa.large_list(pa.int32())
        columns = {"input_ids": pa.array([row.ids for row in encoded], type=integers)}
        if self._has_tags:
            columns["word_starts"] = pa.array([row.word_starts for row in encoded], type=integers)
        return columns
