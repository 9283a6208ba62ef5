"""A rank's part of local files: from any place, also one that the first release wrote."""

import glob
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.distributed import split_dataset_by_node

from sharding.ranks.errors import UserError
from trainer.config.data import SourceConfig
from trainer.data.files import find_files
from trainer.data.rows import FileRows


@pytest.fixture
def source(tmp_path: Path) -> SourceConfig:
    numbers = iter(range(100))
    for part, size in enumerate((5, 1, 9, 4)):
        rows = [json.dumps({"text": f"document {next(numbers)}"}) for _ in range(size)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
    return SourceConfig(source="jsonl", paths=(str(tmp_path),))


def _rest(rows: FileRows) -> list[str]:
    found = []
    while (text := rows.next_text()) is not None:
        found.append(text)
    return found


def _rows(source: SourceConfig, rank: int, degree: int, state: dict[str, Any] | None = None) -> FileRows:
    return FileRows(source, find_files(source).files, rank, degree, state)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_ranks_share_out_all_rows_and_go_on_anywhere(source: SourceConfig, degree: int) -> None:
    parts = [_rest(_rows(source, rank, degree)) for rank in range(degree)]
    assert sorted(text for part in parts for text in part) == sorted(f"document {number}" for number in range(19))
    for rank, part in enumerate(parts):
        rows = _rows(source, rank, degree)
        for number in range(len(part) + 1):
            state = json.loads(json.dumps(rows.state()))
            assert _rest(_rows(source, rank, degree, state)) == part[number:]
            rows.next_text()


@pytest.mark.parametrize(("rank", "degree"), [(0, 1), (1, 2), (2, 3), (0, 3)])
def test_a_place_that_the_first_release_wrote_is_the_same_place(source: SourceConfig, rank: int, degree: int) -> None:
    files = [glob.escape(str(path)) for path in find_files(source).files]

    def open_as_before(state: dict[str, Any] | None = None) -> Any:
        rows = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
        part = split_dataset_by_node(rows, rank, degree)
        if state is not None:
            part.load_state_dict(state)
        return part

    part = open_as_before()
    expected = [row["text"] for row in part]
    # Twice continued, as a run may have been.
    first = open_as_before()
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    second = open_as_before(json.loads(json.dumps(first.state_dict())))
    iterator = iter(second)
    for number in range(3, len(expected)):
        assert next(iterator)["text"] == expected[number]
        state = json.loads(json.dumps(second.state_dict()))
        assert _rest(_rows(source, rank, degree, state)) == expected[number + 1 :]


def test_a_place_of_an_unknown_kind_is_refused(source: SourceConfig) -> None:
    with pytest.raises(UserError, match="the checkpoint's place in the stream is of an unknown kind"):
        _rows(source, 0, 1, {"examples_iterable": {"type": "Other"}})
