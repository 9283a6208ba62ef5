"""Where words begin among tokens, as far as a tokenizer's vocabulary tells."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.tokenizer import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPACE, _LETTER, _DIGIT, _OTHER, _ANY = range(5)


@dataclass(frozen=True)
class WordTable:
    """What each token of a vocabulary begins and ends with; arrays are [vocab_size].

    Attributes:
        is_text: bool, whether it stands for text and is no control token.
        is_start: bool, whether it begins a word whatever is before it.
        first: int8, kind of its first character: space, letter, digit or another.
        last: int8, kind of its last one; any where it is a single space, to which whatever follows belongs.
    """

    is_text: np.ndarray
    is_start: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def word_numbers(self, tokens: np.ndarray) -> np.ndarray:
        """For tokens [rows, length] the number of each one's word in its row, int64 from 0."""
        starts = self.is_start[tokens]
        before = self.last[tokens[:, :-1]]
        starts[:, 1:] |= (self.first[tokens[:, 1:]] != before) & (before != _ANY)
        starts[:, 0] = True
        return starts.cumsum(axis=1) - 1


def word_table(tokenizer: "PreTrainedTokenizerFast", vocab_size: int) -> WordTable:
    """The table of a tokenizer.

    Under WordPiece a word begins with each token that does not say that it continues one. Elsewhere with each that
    begins with a space, and where letters, digits and other characters meet, which byte-level BPE never joins.

    Args:
        tokenizer: its vocabulary is looked at.
        vocab_size: largest token id and one.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    prefix = backend["model"].get("continuing_subword_prefix") if backend["model"]["type"] == "WordPiece" else None
    text_of = _byte_level_text if '"ByteLevel"' in json.dumps([backend["pre_tokenizer"], backend["decoder"]]) else str
    is_text, is_start = np.zeros(vocab_size, dtype=bool), np.ones(vocab_size, dtype=bool)
    first, last = np.zeros((2, vocab_size), dtype=np.int8)
    special = special_tokens(tokenizer)
    for token, token_id in tokenizer.get_vocab().items():
        if token in special:
            continue
        is_text[token_id] = True
        if prefix is not None:
            is_start[token_id] = not token.startswith(prefix)
            continue
        text = text_of(token).replace("\u2581", " ")
        first[token_id], last[token_id] = _kind(text[:1]), _ANY if text == " " else _kind(text[-1:])
        is_start[token_id] = first[token_id] == _SPACE
    return WordTable(is_text, is_start, first, last)


def _kind(character: str) -> int:
    if not character or character.isspace():
        return _SPACE
    if character.isalpha() or character == "\ufffd":
        # What replaces a part of a character: those of more than one byte are letters for the most part.
        return _LETTER
    return _DIGIT if character.isnumeric() else _OTHER


def _byte_level_text(token: str) -> str:
    """The text of a token in the alphabet of byte-level BPE (Radford et al., 2019), in which each byte is printable."""
    return bytes(_BYTES.get(character, 0) for character in token).decode(errors="replace")


def _alphabet() -> dict[str, int]:
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _alphabet()
