"""Streaming: a source that is read, tokenised and packed while training, and continued exactly where it was.

Nothing is stored. A rank's position is a place in its part of the source, from which the tokens that follow are made
again: reading, cleaning, tokenising and packing depend on the source alone. So a state is small and exact.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sharding.parallel_dims import ParallelDims
from sharding.ranks.errors import UserError
from sharding.ranks.object_exchange import gather_objects
from sharding.ranks.process_group import Ranks
from trainer.config.data import DataConfig
from trainer.data.clean import encode_text, hash_position
from trainer.data.corpus import all_files
from trainer.data.order import SampleOrder
from trainer.data.packed import packed_rows
from trainer.data.prepared import PreparedStream
from trainer.data.read_ahead import ReadAhead
from trainer.data.rows import FileRows, HubRows, Rows, State
from trainer.data.samples import MicroBatch
from trainer.data.tokenizer import text_encoder, use_worker_threads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BATCH_DOCUMENTS = 32


class DocumentStream:
    """One rank's part of a source, over and over, without the documents that are held out."""

    def __init__(
        self, config: DataConfig, validation_limit: float, dp_rank: int, dp_degree: int, state: State | None
    ) -> None:
        """Begin at the start of the source, or at a state."""
        self._config = config
        self._validation_limit = validation_limit
        self._place = (dp_rank, dp_degree)
        self._name = config.hub_name or ", ".join(config.paths) or config.source
        self._epoch = 0 if state is None else int(state["epoch"])
        self._num_kept = 0 if state is None else int(state["num_kept"])
        self._rows = self._open(None if state is None else state["source"])

    def state(self) -> State:
        """Where the next document is."""
        return {"epoch": self._epoch, "num_kept": self._num_kept, "source": self._rows.state()}

    def next_texts(self, num_documents: int) -> list[str]:
        """The next documents, cleaned; fewer at the end of an epoch.

        Raises:
            UserError: the source cannot be read, or this rank's part of it has no documents.
        """
        texts: list[str] = []
        while len(texts) < num_documents:
            row = self._rows.next_text()
            if row is None:
                if self._num_kept + len(texts) == 0:
                    raise UserError(self._nothing())
                self._epoch += 1
                self._num_kept = 0
                self._rows = self._open(None)
                return texts
            text = self._kept_text(row)
            if text is not None:
                texts.append(text)
        self._num_kept += len(texts)
        return texts

    def _open(self, state: State | None) -> Rows:
        if self._config.source == "hub":
            return HubRows(self._config, *self._place, state)
        return FileRows(self._config, all_files(self._config), *self._place, state)

    def _kept_text(self, text: str) -> str | None:
        encoded = encode_text(text, self._config.normalize)
        if not encoded.strip() or hash_position(hashlib.sha256(encoded).digest()) < self._validation_limit:
            return None
        return encoded.decode()

    def _nothing(self) -> str:
        rank, degree = self._place
        return (
            f"data.streaming=true: {self._name} has no documents to train on for data-parallel rank {rank} of "
            f"{degree}, less the empty and the held-out ones; start fewer ranks, or lower data.validation_fraction."
        )


@dataclass
class _Chunk:
    """Tokens of some documents, where they start, and the state of the documents before them."""

    before: State
    tokens: np.ndarray
    is_start: np.ndarray


class PackedStream:
    """The tokens of a stream of documents, cut into rows."""

    def __init__(self, documents: DocumentStream, tokenizer: "PreTrainedTokenizerFast", num_skipped: int = 0) -> None:
        """Begin a number of tokens after the place where the documents are."""
        self._documents = documents
        self._encoder = text_encoder(tokenizer)
        self._eos_token_id = tokenizer.eos_token_id
        self._chunks: deque[_Chunk] = deque()
        self._num_available = 0
        self._num_read = num_skipped

    def state(self) -> State:
        """Where the next row begins: documents, and tokens after them."""
        if not self._chunks:
            return {"documents": self._documents.state(), "num_tokens": self._num_read}
        return {"documents": self._chunks[0].before, "num_tokens": self._num_read}

    def next_row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, int64 [length + 1], and where documents start; the last token is the next row's first."""
        while self._num_available - self._num_read < length + 1:
            self._tokenise()
        start, stop = self._num_read, self._num_read + length + 1
        pieces = []
        for chunk in self._chunks:
            pieces.append((chunk.tokens[max(start, 0) : stop], chunk.is_start[max(start, 0) : stop]))
            start, stop = start - len(chunk.tokens), stop - len(chunk.tokens)
            if stop <= 0:
                break
        self._num_read += length
        while self._num_read >= len(self._chunks[0].tokens):
            num_tokens = len(self._chunks.popleft().tokens)
            self._num_read -= num_tokens
            self._num_available -= num_tokens
        tokens, is_start = zip(*pieces, strict=True)
        return np.concatenate(tokens), np.concatenate(is_start)

    def _tokenise(self) -> None:
        before = self._documents.state()
        texts = self._documents.next_texts(_BATCH_DOCUMENTS)
        tokens: list[int] = []
        starts = []
        for encoding in self._encoder.encode_batch_fast(texts, add_special_tokens=False):
            starts.append(len(tokens))
            tokens += [*encoding.ids, self._eos_token_id]
        is_start = np.zeros(len(tokens), dtype=bool)
        is_start[starts] = True
        self._chunks.append(_Chunk(before, np.array(tokens, dtype=np.int64), is_start))
        self._num_available += len(tokens)


class StreamingLoader:
    """One rank's micro-batches from a stream.

    Rows are shuffled within windows: a window is packed whole and visited in a permutation that is keyed by seed, rank
    and window. A state is where the window began and how far it was visited.
    """

    def __init__(
        self,
        corpus: PreparedStream,
        config: DataConfig,
        *,
        seed: int,
        global_size: int,
        micro_size: int,
        dp_rank: int,
        dp_degree: int,
        start_sample: int = 0,
        state: State | None = None,
        prefetch_steps: int = 2,
    ) -> None:
        """Start reading ahead.

        Args:
            corpus: tokenizer and what is held out.
            config: the source, and how it is cut and shuffled.
            seed: the run's seed.
            global_size: samples in a step over all ranks, a multiple of ``micro_size * dp_degree``.
            micro_size: samples in a micro-batch.
            dp_rank: this rank among those that read different data.
            dp_degree: number of those ranks.
            start_sample: samples that were consumed before, over all ranks.
            state: where to continue; None begins.
            prefetch_steps: steps that are read ahead; 0 reads on demand, in the caller's thread.
        """
        from transformers import AutoTokenizer

        # Beside training, the library must not take all cores for itself, as it does when left alone.
        use_worker_threads(max(1, config.num_workers))
        self._config = config
        self._micro_size = micro_size
        self._global_size = global_size
        self._next_sample = start_sample
        starts = np.arange(dp_rank * micro_size, global_size, dp_degree * micro_size)
        self._local_positions = starts[:, None] + np.arange(micro_size)
        self._window = 0 if state is None else int(state["window"])
        self._position = 0 if state is None else int(state["position"])
        stream_state: State = {"documents": None, "num_tokens": 0} if state is None else state["stream"]
        documents = DocumentStream(config, corpus.validation_limit, dp_rank, dp_degree, stream_state["documents"])
        tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_dir, trust_remote_code=False)
        self._stream = PackedStream(documents, tokenizer, stream_state["num_tokens"])
        rank_seed = int.from_bytes(hashlib.blake2b(f"{seed}:{dp_rank}".encode(), digest_size=7).digest(), "little")
        self._order = SampleOrder(rank_seed, config.shuffle_window, config.shuffle)
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []
        self._state: State = self._new_state(self._stream.state())
        self._steps = ReadAhead(self._read_steps(), prefetch_steps)

    def next_step(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next step, each of samples as ``packed_rows`` gives them."""
        batches, self._state = self._steps.next()
        return batches

    def state(self) -> State:
        """What a loader continues from after the steps that were handed out, not those that were read ahead."""
        return self._state

    def close(self) -> None:
        """Stop reading ahead."""
        self._steps.close()

    def _read_steps(self) -> Iterator[tuple[list[MicroBatch], State]]:
        window_start = self._stream.state()
        while True:
            rows = []
            for _ in range(self._local_positions.size):
                if not self._rows:
                    self._rows = [
                        self._stream.next_row(self._config.sequence_length) for _ in range(self._config.shuffle_window)
                    ]
                position = np.array([self._window * self._config.shuffle_window + self._position])
                rows.append(self._rows[int(self._order.indices(position)[0])])
                self._position += 1
                if self._position == self._config.shuffle_window:
                    self._window, self._position, self._rows = self._window + 1, 0, []
                    window_start = self._stream.state()
            yield self._micro_batches(rows), self._new_state(window_start)

    def _micro_batches(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> list[MicroBatch]:
        batches = []
        for index, positions in enumerate(self._next_sample + self._local_positions):
            tokens, is_start = zip(*rows[index * self._micro_size :][: self._micro_size], strict=True)
            samples = packed_rows(np.stack(tokens), is_start=np.stack(is_start) if self._config.document_mask else None)
            batches.append(MicroBatch(samples, torch.from_numpy(positions)))
        self._next_sample += self._global_size
        return batches

    def _new_state(self, window_start: State) -> State:
        return {"window": self._window, "position": self._position, "stream": window_start}


def gather_states(state: State | None, dims: ParallelDims, ranks: Ranks) -> list[State]:
    """The states of loaders by data rank, none where loaders have no state; every rank must call it."""
    if state is None:
        return []
    states = gather_objects(state, ranks)
    return [states[rank] for rank in dims.first_readers()]


def state_of_rank(states: list[State], num_samples: int, dp_rank: int, dp_degree: int) -> State | None:
    """A rank's state from a checkpoint; None at the start of a run.

    Raises:
        UserError: the checkpoint has states for another number of ranks.
    """
    if num_samples == 0:
        return None
    if len(states) != dp_degree:
        raise UserError(
            f"data.streaming=true: the checkpoint holds the places of {len(states)} data-parallel ranks in the stream, "
            f"and there are {dp_degree} now; each rank reads a part of its own, so the places cannot be divided "
            f"otherwise: start {len(states)} ranks, or begin the data anew in another run with checkpoint.from and "
            "checkpoint.load=weights."
        )
    return states[dp_rank]
