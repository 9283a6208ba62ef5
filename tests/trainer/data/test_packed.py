"""Packed tokens as samples: facts and identity, and what a row holds."""

import subprocess
import sys
from pathlib import Path

import torch

from tests.support import ROOT
from trainer.config import load_config
from trainer.data.facts import SampleFacts
from trainer.data.packed import packed_samples
from trainer.data.prepare import prepare_corpus
from trainer.data.prepared import PreparedCorpus


def test_facts_are_known_without_torch() -> None:
    program = "import sys, trainer.data.facts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_a_prepared_corpus_is_samples(config_file: Path) -> None:
    data = load_config(config_file).data
    corpus = prepare_corpus(data, progress=False)
    assert isinstance(corpus, PreparedCorpus)
    length = data.sequence_length
    samples = packed_samples(corpus, data)
    assert samples.fingerprint == corpus.fingerprint
    eos = corpus.eos_token_id
    assert samples.facts == SampleFacts(length, corpus.vocab_size, eos, corpus.tokenizer_dir, pad_token_id=eos)
    for split in ("train", "validation"):
        stream = corpus.stream(split)
        number = samples.num_samples(split)
        assert number == stream.num_samples(length) > 1
        rows = samples.read(split, [number - 1, 0])
        assert rows.keys() == {"tokens", "num_tokens"}
        # The last one has what is left, and nothing behind it.
        num_left = stream.num_tokens - (number - 1) * length
        assert rows["num_tokens"].tolist() == [num_left, length + 1]
        assert rows["tokens"][0, :num_left].tolist() == stream.read((number - 1) * length, stream.num_tokens).tolist()
        assert not rows["tokens"][0, num_left:].any()
        assert rows["tokens"][1].tolist() == stream.read(0, length + 1).tolist()
        masked = packed_samples(corpus, data.model_copy(update={"document_mask": True})).read(split, [0])
        starts = stream.document_starts(0, length + 1)
        assert masked["document_starts"].nonzero()[:, 1].tolist() == starts.tolist()
        assert torch.equal(masked["tokens"][0], rows["tokens"][1])
