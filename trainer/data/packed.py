"""Stream of packed tokens, as Samples."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from sharding.engine import Batch
from trainer.config.data import DataConfig
from trainer.data.facts import SampleFacts
from trainer.data.prepared import PreparedTokens
from trainer.data.shards import Stream, split_targets


class PackedSamples:
    """Sample i of a split covers tokens [i * length, i * length + length] of its stream; the last may be short."""

    def __init__(
        self,
        open_stream: Callable[[str], Stream],
        facts: SampleFacts,
        *,
        fingerprint: str = "",
        document_mask: bool = False,
    ) -> None:
        """Bind to streams.

        Args:
            open_stream: the tokens of a split, by its name; asked once for each split that is used.
            facts: with the length of a sample.
            fingerprint: of the tokens.
            document_mask: say where documents start as well.
        """
        if facts.sequence_length is None:
            raise ValueError("packed samples have a length")
        self._open_stream = open_stream
        self._streams: dict[str, Stream] = {}
        self._facts = facts
        self._length = facts.sequence_length
        self._fingerprint = fingerprint
        self._document_mask = document_mask

    @property
    def fingerprint(self) -> str:
        """See Samples."""
        return self._fingerprint

    @property
    def facts(self) -> SampleFacts:
        """See Samples."""
        return self._facts

    def num_samples(self, split: str) -> int:
        """See Samples; there is no split for tests."""
        return 0 if split == "test" else self._stream(split).num_samples(self._length)

    def read(self, split: str, indices: Sequence[int]) -> Batch:
        """See Samples; as ``packed_rows`` gives them."""
        stream, length = self._stream(split), self._length
        tokens = np.zeros((len(indices), length + 1), dtype=np.int64)
        num_tokens = np.full(len(indices), length + 1)
        is_start = np.zeros(tokens.shape, dtype=bool) if self._document_mask else None
        is_target = np.ones(tokens.shape, dtype=bool) if stream.has_targets else None
        for row, index in enumerate(indices):
            source, local_index = stream.locate(index, length)
            start = local_index * length
            stop = min(start + length + 1, source.num_tokens)
            num_tokens[row] = stop - start
            source.read_into(start, stop, tokens[row, : stop - start])
            if is_start is not None:
                is_start[row, source.document_starts(start, start + length + 1) - start] = True
            if is_target is not None and source.has_targets:
                tokens[row], is_target[row] = split_targets(tokens[row])
        return packed_rows(tokens, num_tokens, is_start, is_target)

    def _stream(self, split: str) -> Stream:
        if split not in self._streams:
            self._streams[split] = self._open_stream(split)
        return self._streams[split]


def packed_samples(corpus: PreparedTokens, data: DataConfig, *, verify: bool = True) -> PackedSamples:
    """The samples of a prepared corpus or mixture; of a streamed source those of its prepared beginning."""
    return PackedSamples(
        lambda split: corpus.stream(split, verify=verify),
        sample_facts(corpus, data),
        fingerprint=corpus.fingerprint,
        document_mask=data.document_mask,
    )


def sample_facts(corpus: PreparedTokens, data: DataConfig) -> SampleFacts:
    """What is known of the samples of a prepared corpus, before any is read."""
    manifest = corpus.corpora[0].manifest
    return SampleFacts(
        sequence_length=data.sequence_length,
        vocab_size=corpus.vocab_size,
        eos_token_id=corpus.eos_token_id,
        tokenizer_dir=corpus.tokenizer_dir,
        pad_token_id=manifest.pad_token_id,
        mask_token_id=manifest.mask_token_id if data.mask_token else None,
    )


def packed_rows(
    tokens: np.ndarray,
    num_tokens: np.ndarray | None = None,
    is_start: np.ndarray | None = None,
    is_target: np.ndarray | None = None,
) -> Batch:
    """Rows of packed tokens as samples.

    Args:
        tokens: int64 [rows, length + 1]; a row's last token is only there to be predicted.
        num_tokens: int64 [rows], tokens of each row that the stream has; all by default.
        is_start: bool [rows, length + 1], where documents start; given where they are kept apart.
        is_target: bool [rows, length + 1], which tokens are to be predicted; given where not all are.

    Returns:
        ``tokens`` and ``num_tokens``, with ``is_start`` also ``document_starts``, and with ``is_target`` that.
    """
    counts = np.full(len(tokens), tokens.shape[1]) if num_tokens is None else num_tokens
    rows = {"tokens": torch.from_numpy(tokens), "num_tokens": torch.from_numpy(counts)}
    if is_start is not None:
        rows["document_starts"] = torch.from_numpy(is_start)
    if is_target is not None:
        rows["is_target"] = torch.from_numpy(is_target)
    return rows
