"""A rank's part of a source, document by document, from any place in it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from sharding.ranks.errors import UserError
from trainer.config.data import SourceConfig
from trainer.data.corpus import hub_rows, read_local_file, reading, text_of

State = dict[str, Any]

_START = {"file": 0, "row": 0, "num_rows": 0}


class Rows(Protocol):
    """Texts of a source, and the place of the next one."""

    def next_text(self) -> str | None:
        """The next text, empty where a row has none; None at the end.

        Raises:
            UserError: the source cannot be read.
        """

    def state(self) -> State:
        """Where the next text is; a pure value."""


class FileRows:
    """Ranks share out whole files where their number allows it, else every rank reads all and takes each n-th row."""

    def __init__(self, config: SourceConfig, files: list[Path], rank: int, degree: int, state: State | None) -> None:
        """Begin at the start, or at a state.

        Raises:
            UserError: the state is of an unknown kind.
        """
        divides = len(files) % degree == 0
        self._config = config
        self._files = files[rank::degree] if divides else files
        self._every, self._first = (1, 0) if divides else (degree, rank)
        num_given = 0 if state is None else _num_given_by_datasets(state)
        place = _START if state is None or num_given is not None else state
        if place.keys() != _START.keys():
            raise UserError(
                "data.streaming=true: the checkpoint's place in the stream is of an unknown kind; continue with the "
                "release that wrote it, or begin the data anew in another run with checkpoint.from and "
                "checkpoint.load=weights."
            )
        self._file, self._row = int(place["file"]), int(place["row"])
        # Over all files.
        self._num_rows = int(place["num_rows"])
        self._texts = self._open(self._row)
        for _ in range(num_given or 0):
            self.next_text()

    def next_text(self) -> str | None:
        """See Rows."""
        while self._file < len(self._files):
            text = next(self._texts, None)
            if text is None:
                self._file, self._row = self._file + 1, 0
                self._texts = self._open(0)
                continue
            self._row += 1
            self._num_rows += 1
            if (self._num_rows - 1) % self._every == self._first:
                return text
        return None

    def state(self) -> State:
        """See Rows."""
        return {"file": self._file, "row": self._row, "num_rows": self._num_rows}

    def _open(self, num_skipped: int) -> Iterator[str]:
        if self._file < len(self._files):
            for number, document in enumerate(read_local_file(self._files[self._file], self._config)):
                if number >= num_skipped:
                    yield document.text


def _num_given_by_datasets(state: State) -> int | None:
    """Rows that a rank had been given where a state is of 0.1.0, which read files by ``datasets``; None elsewhere.

    Files and rows were shared out as here, and each row was a batch.
    """
    place = state.get("examples_iterable")
    if isinstance(place, dict) and place.get("type") == "RebatchedArrowExamplesIterable":
        return int(place["batch_idx"])
    return None


class HubRows:
    """As FileRows, of a data set of the hub, as ``datasets`` divides it."""

    def __init__(self, config: SourceConfig, rank: int, degree: int, state: State | None) -> None:
        """Begin at the start, or at a state.

        Raises:
            UserError: the data set cannot be had.
        """
        from datasets.distributed import split_dataset_by_node

        self._config = config
        self._loaded = state
        with reading(config, str(config.hub_name)):
            self._rows = split_dataset_by_node(hub_rows(config), rank, degree)
            if state is not None:
                self._rows.load_state_dict(state)
            self._iterator: Iterator[dict[str, Any]] = iter(self._rows)

    def next_text(self) -> str | None:
        """See Rows."""
        with reading(self._config, str(self._config.hub_name)):
            row = next(self._iterator, None)
        self._loaded = None
        return None if row is None else text_of(row, self._config, f"a row of {self._config.hub_name}")

    def state(self) -> State:
        """See Rows."""
        # Until the first row is read, datasets does not give back the state that it was given.
        return self._rows.state_dict() if self._loaded is None else self._loaded
