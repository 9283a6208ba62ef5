"""Which documents are at which positions of training."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.config import RunConfig
from trainer.data.prepared import Prepared, PreparedTokens
from trainer.data.prepared_own import PreparedOwn
from trainer.data.prepared_rows import PreparedRows
from trainer.data.row_store import StoredRows
from trainer.data.shards import DocumentSpan

MOST_POSITIONS = 4096
"""Sample positions whose documents are named in an event."""


@dataclass(frozen=True)
class ShownSample:
    """One training sample and where it comes from.

    Attributes:
        position: global sample position since the start of the run.
        source: name of its source in a mixture, else empty.
        epoch: epoch of the source that the position is in, from 0.
        index: which sample of the source's stream it is.
        documents: the documents that it covers; positions are tokens of the stream.
        token_ids: the tokens that the model reads.
        is_target: whether each is one that is predicted from those before it; None where all are.
        num_targets: how many of them have a target.
    """

    position: int
    source: str
    epoch: int
    index: int
    documents: list[DocumentSpan]
    token_ids: list[int]
    is_target: list[bool] | None
    num_targets: int


def samples_at(config: RunConfig, corpus: PreparedTokens, positions: np.ndarray) -> Iterator[ShownSample]:
    """The samples at global sample positions, int64 [n]."""
    stream, length = corpus.stream("train"), config.data.sequence_length
    order = corpus.order(config.seed, config.data)
    places = zip(positions.tolist(), order.epochs(positions).tolist(), order.indices(positions).tolist(), strict=True)
    for position, epoch, global_index in places:
        source, index = stream.locate(global_index, length)
        begin = index * length
        tokens, targets = source.read_targets(begin, min(begin + length + 1, source.num_tokens))
        # Its last token is only there to be predicted, and its first one is not.
        num_inputs, num_targets = len(tokens) - 1, int(targets[1:].sum())
        is_target = targets[:num_inputs].tolist() if source.has_targets else None
        documents = source.documents_between(begin, begin + num_inputs)
        shown = tokens[:num_inputs].tolist()
        yield ShownSample(position, source.name, epoch, index, documents, shown, is_target, num_targets)


def documents_in(config: RunConfig, corpus: Prepared, ranges: Iterable[Sequence[int]]) -> list[dict[str, Any]]:
    """The documents or rows that ranges of global sample positions touch, each once, in order of training.

    Of many positions only the first ``MOST_POSITIONS`` are looked at: other ranks wait meanwhile.

    Returns:
        For each its index in its source, its id there (a path, or file and row) and, in a mixture, the source's name.
    """
    if isinstance(corpus, PreparedRows | PreparedOwn):
        return _rows_in(config, corpus, ranges)
    stream, length = corpus.stream("train"), config.data.sequence_length
    order = corpus.order(config.seed, config.data)
    documents: dict[tuple[str, int], dict[str, Any]] = {}
    for first, end in _first_positions(ranges):
        for global_index in order.indices(np.arange(first, end)).tolist():
            source, index = stream.locate(global_index, length)
            named = {"source": source.name} if source.name else {}
            # The last token of the stream is nobody's input.
            for span in source.documents_between(index * length, min((index + 1) * length, source.num_tokens - 1)):
                entry = named | {"document": span.document_index, "id": span.source_id}
                documents.setdefault((source.name, span.document_index), entry)
    return list(documents.values())


def _rows_in(
    config: RunConfig, rows: PreparedRows | PreparedOwn, ranges: Iterable[Sequence[int]]
) -> list[dict[str, Any]]:
    if isinstance(rows, PreparedRows):
        source_id = StoredRows(rows.folder, rows.manifest.splits["train"], verify=False).source_id
    else:
        # Only their maker knows more of them.
        source_id = "sample {}".format
    order = rows.order(config.seed, config.data)
    found: dict[int, dict[str, Any]] = {}
    for first, end in _first_positions(ranges):
        for index in order.indices(np.arange(first, end)).tolist():
            found.setdefault(index, {"document": index, "id": source_id(index)})
    return list(found.values())


def _first_positions(ranges: Iterable[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """The ranges up to ``MOST_POSITIONS`` positions."""
    left = MOST_POSITIONS
    for first, end in ranges:
        yield first, min(end, first + left)
        left -= min(end - first, left)
