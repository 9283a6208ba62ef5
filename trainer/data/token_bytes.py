"""How many bytes of text each token of a vocabulary stands for."""

import json
import re
from pathlib import Path
from typing import Any

import torch

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def token_bytes(tokenizer_dir: Path, vocab_size: int) -> torch.Tensor | None:
    """Bytes of UTF-8 of each token, int64 [vocab_size]; 0 for control tokens, which are no text.

    Known where tokens are pieces of the text as it is: of byte-level tokenizers, such as GPT-2's, and of those that
    fall back to bytes, such as Llama's. None elsewhere: WordPiece, say, drops spaces and case.

    Args:
        tokenizer_dir: folder with a ``tokenizer.json``.
        vocab_size: largest token id and one.
    """
    path = tokenizer_dir / "tokenizer.json"
    if not path.exists():
        return None
    description: dict[str, Any] = json.loads(path.read_text())
    model = description["model"]
    vocabulary = model.get("vocab")
    tokens = vocabulary if isinstance(vocabulary, dict) else {token: i for i, (token, _) in enumerate(vocabulary or [])}
    if _has_step(description.get("decoder"), "ByteLevel"):
        # Each character stands for a byte.
        sizes = {i: len(token) for token, i in tokens.items()}
    elif model.get("byte_fallback"):
        # This character stands for a space.
        as_text = {token: token.replace("\u2581", " ") for token in tokens}
        sizes = {i: 1 if _BYTE_TOKEN.fullmatch(token) else _num_bytes(as_text[token]) for token, i in tokens.items()}
    else:
        return None
    for added in description.get("added_tokens") or []:
        sizes[added["id"]] = 0 if added["special"] else _num_bytes(added["content"])
    table = torch.zeros(vocab_size, dtype=torch.int64)
    for i, size in sizes.items():
        if i < vocab_size:
            table[i] = size
    return table


def _num_bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _has_step(step: dict[str, Any] | None, kind: str) -> bool:
    """Whether a part of a tokenizer is of a kind, or a sequence with one that is."""
    if step is None:
        return False
    return step["type"] == kind or any(_has_step(inner, kind) for inner in step.get("decoders", ()))
