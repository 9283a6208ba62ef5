"""Bytes of tokens add up to the bytes of the text that they are."""

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from trainer.data.facts import SampleFacts
from trainer.data.packed import packed_rows
from trainer.data.token_bytes import token_bytes
from trainer.data.tokenizer import train_byte_level_bpe, vocabulary_size
from trainer.tasks.causal_lm import CausalLanguageModelling
from trainer.tasks.task import Outputs

_TEXT = "Grüße, 世界! 🙂 def f(x):\n\treturn x  # twice\n"


def _fallback_tokenizer() -> Tokenizer:
    """As Llama's: words that begin with a mark for a space, and bytes for what no token has."""
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁def(x):returntwic#", "re", "▁re"]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
        merges=[("r", "e"), ("▁", "re")],
        byte_fallback=True,
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


def test_byte_level(tmp_path: Path) -> None:
    tokenizer = train_byte_level_bpe([_TEXT, "return the word"], 300)
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer(_TEXT)["input_ids"]
    assert len(ids) < len(_TEXT.encode())
    table = token_bytes(tmp_path, vocabulary_size(tokenizer) + 3)
    assert table is not None
    assert int(table[ids].sum()) == len(_TEXT.encode())
    assert table[tokenizer.eos_token_id] == 0
    # Bits per byte of a row: what was lost, over the bytes of the tokens that were to be predicted.
    facts = SampleFacts(len(ids), vocabulary_size(tokenizer), tokenizer.eos_token_id, tmp_path)
    task = CausalLanguageModelling(facts=facts)
    row = torch.tensor([[*ids, tokenizer.eos_token_id]]).numpy()
    batch = task.make_batch(packed_rows(row), torch.tensor([0]), training=False)
    num_bytes = len(_TEXT.encode()) - len(tokenizer.decode(ids[:1]).encode())
    assert batch["num_bytes"].tolist() == [num_bytes]
    logits = torch.zeros(1, len(ids), 4)
    logits = torch.nn.functional.one_hot(batch["labels"], vocabulary_size(tokenizer)).float() + logits[..., :1]
    metrics = task.metrics(task.evaluate(Outputs(logits=logits), batch))
    assert metrics["bits_per_byte"].value == pytest.approx(
        metrics["loss"].value * len(ids) / math.log(2) / num_bytes, rel=1e-12
    )
    assert "num_bytes" not in task.make_batch(packed_rows(row), torch.tensor([0]), training=True)
    filler = task.make_batch(packed_rows(row), torch.tensor([-1]), training=False)
    assert filler["num_bytes"].tolist() == [0]


def test_fallback_to_bytes(tmp_path: Path) -> None:
    tokenizer = _fallback_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    table = token_bytes(tmp_path, tokenizer.get_vocab_size())
    assert table is not None
    ids = tokenizer.encode(_TEXT).ids
    assert any(tokenizer.id_to_token(i).startswith("<0x") for i in ids)
    assert table[:2].tolist() == [0, 0]
    # With the space that is put before it.
    assert int(table[ids].sum()) == len(_TEXT.encode()) + 1


def test_tokens_that_are_no_pieces_of_text(tmp_path: Path) -> None:
    assert token_bytes(tmp_path, 10) is None
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert token_bytes(tmp_path, 3) is None
    facts = SampleFacts(2, 3, 0, tmp_path)
    task = CausalLanguageModelling(facts=facts)
    batch = task.make_batch(packed_rows(torch.tensor([[1, 2, 0]]).numpy()), torch.tensor([0]), training=False)
    assert "num_bytes" not in batch
