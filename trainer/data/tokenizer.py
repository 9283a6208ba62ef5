"""Tokenizers: one of `transformers`, or a byte-level BPE trained on the corpus."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sharding.errors import UserError
from trainer.data.config import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAINED = "train-bpe"
END_OF_TEXT = "<|endoftext|>"


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE as GPT-2 uses it (Radford et al., 2019): any text can be encoded, none is unknown.

    Args:
        texts: training documents.
        vocab_size: largest number of tokens; a small corpus may give fewer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """Load a tokenizer by `transformers` name or folder.

    Raises:
        UserError: there is none, or it has no fast implementation or no token that ends a document.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - transformers raises many kinds for a missing or broken tokenizer
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data.tokenizer={name} cannot be loaded ({reason}); name a tokenizer folder, or use {TRAINED}."
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"data.tokenizer={name} has no fast implementation; name another, or use {TRAINED}.")
    if tokenizer.eos_token_id is None:
        raise UserError(f"data.tokenizer={name} has no end-of-text token to put between documents; name another.")
    return tokenizer


def tokenizer_identity(config: DataConfig) -> str:
    """What tells two tokenizers of one configuration apart: the contents of a local folder."""
    folder = Path(config.tokenizer).expanduser()
    if config.tokenizer == TRAINED or not folder.is_dir():
        return f"{config.tokenizer}:{config.vocab_size if config.tokenizer == TRAINED else ''}"
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".model"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """SHA-256 of a tokenizer's own serialised form."""
    return hashlib.sha256(
        json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()), sort_keys=True).encode()
    ).hexdigest()


def use_worker_threads(num_workers: int) -> None:
    """Let `tokenizers` encode batches on this many threads; 0 means one per usable core.

    The library reads these variables when it starts its thread pool, which it does once.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(num_workers or len(os.sched_getaffinity(0)))
