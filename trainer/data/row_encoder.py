"""Texts and lists of words as tokens; imports no torch and no transformers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class EncodedRow:
    """A text in tokens.

    Attributes:
        ids: its tokens, with what the tokenizer puts around a text.
        word_starts: of words the first token of each, -1 where it was cut off or has none.
        is_truncated: whether its end was cut off.
    """

    ids: list[int]
    word_starts: list[int]
    is_truncated: bool


class RowEncoder:
    """Encodes texts, or lists of words, for rows."""

    def __init__(self, encoder: "Tokenizer", *, has_tags: bool) -> None:
        """Bind to what encodes text.

        Args:
            encoder: as ``trainer.data.tokenizer.text_encoder`` makes it.
            has_tags: whether texts are lists of words.
        """
        self._encoder = encoder
        self._has_tags = has_tags
        self._has_spaces = joins_spaces(encoder)

    def encode(self, texts: Sequence[str | list[str]], max_tokens: int | None) -> list[EncodedRow]:
        """Tokens of each text, cut to the most that are read.

        Args:
            texts: each a text or a list of words.
            max_tokens: the most; None for all.
        """
        if max_tokens is None:
            self._encoder.no_truncation()
        else:
            self._encoder.enable_truncation(max_tokens)
        given = [self._spaced(text) if isinstance(text, list) else text for text in texts]
        encodings = self._encoder.encode_batch(given, is_pretokenized=self._has_tags, add_special_tokens=True)
        return [
            EncodedRow(
                encoding.ids,
                _word_starts(encoding.word_ids, len(text)) if self._has_tags else [],
                bool(encoding.overflowing),
            )
            for encoding, text in zip(encodings, texts, strict=True)
        ]

    def _spaced(self, words: list[str]) -> list[str]:
        return [f" {word}" if number and self._has_spaces else word for number, word in enumerate(words)]


def joins_spaces(encoder: "Tokenizer") -> bool:
    """Whether a word and the space before it are one to a tokenizer, as to one of bytes."""
    return '"type":"ByteLevel"' in json.dumps(json.loads(encoder.to_str())["pre_tokenizer"], separators=(",", ":"))


def _word_starts(word_ids: list[int | None], num_words: int) -> list[int]:
    """The first token of each word, -1 where it was cut off or has none."""
    starts = [-1] * num_words
    for place, word in reversed(list(enumerate(word_ids))):
        if word is not None:
            starts[word] = place
    return starts
