"""Files of documents: none is lost without a word, whatever it is called, compressed with, or lacks."""

import bz2
import gzip
import json
import lzma
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from sharding.ranks.errors import UserError
from trainer.config.data import DataConfig
from trainer.data.corpus import read_documents
from trainer.data.prepare import prepare_corpus
from trainer.data.prepared import PreparedCorpus


def _config(tmp_path: Path, paths: Any, **settings: Any) -> DataConfig:
    defaults = {"source": "jsonl", "vocab_size": 300, "validation_fraction": 0.0, "cache_dir": str(tmp_path / "cache")}
    return DataConfig.model_validate(defaults | {"paths": paths} | settings)


def _prepare(tmp_path: Path, paths: Any, **settings: Any) -> PreparedCorpus:
    (corpus,) = prepare_corpus(_config(tmp_path, paths, **settings)).corpora
    return corpus


def _lines(first: int, last: int) -> bytes:
    return "".join(json.dumps({"text": f"document number {number}"}) + "\n" for number in range(first, last)).encode()


def _parquet(first: int, last: int) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [f"document number {number}" for number in range(first, last)]}), sink)
    return sink.getvalue().to_pybytes()


def _text(first: int, _last: int) -> bytes:
    return f"document number {first}".encode()


def _two_frames(contents: bytes) -> bytes:
    return zstandard.compress(contents[:20]) + zstandard.compress(contents[20:])


@pytest.mark.parametrize(
    ("source", "make", "names"),
    [
        ("jsonl", _lines, ("a.jsonl", "b.JSONL", "c.ndjson", "d.json", "e.jsonl{}", "f.NDJSON{}")),
        ("parquet", _parquet, ("a.parquet", "b.Parquet", "c.parquet{}")),
        ("text", _text, ("a.txt", "b.TXT", "c.md", "d.txt{}")),
    ],
)
def test_a_folder_is_read_whole_and_what_is_passed_over_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, make: Callable[[int, int], bytes], names: Any
) -> None:
    compressions: list[tuple[str, Callable[[bytes], bytes]]] = [
        (".gz", gzip.compress),
        (".GZ", gzip.compress),
        (".zst", _two_frames),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
    ]
    plain = [(name, bytes) for name in names if "{}" not in name]
    packed = [(name.format(suffix), pack) for name in names if "{}" in name for suffix, pack in compressions]
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for number, (name, pack) in enumerate(plain + packed):
        (folder / ("deep" if number % 2 else "") / name).write_bytes(pack(make(2 * number, 2 * number + 2)))
    # A link to a folder is followed, once.
    (folder / "deep").rename(tmp_path / "elsewhere")
    (folder / "deep").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "notes.csv").write_text("x")
    (folder / "deep" / "old.tar.gz").write_text("x")
    corpus = _prepare(tmp_path, [str(folder)], source=source)
    num_rows = 1 if source == "text" else 2
    assert corpus.manifest.splits["train"].num_documents == num_rows * len(plain + packed)
    note = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("note:"))
    assert "2 files of folders are passed over" in note
    assert note.endswith(f"{folder / 'deep' / 'old.tar.gz'}, {folder / 'notes.csv'}")


def test_one_path_needs_no_list(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(_lines(0, 3))
    assert _config(tmp_path, str(tmp_path / "x.jsonl")).paths == (str(tmp_path / "x.jsonl"),)
    assert _prepare(tmp_path, str(tmp_path / "x.jsonl")).manifest.num_documents_read == 3


def test_rows_without_a_text_are_read_and_empty(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": None}, {"other": 3}, {"text": "two"}, {}, {"text": ""}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.table({"text": ["one", None, "two", None]}), tmp_path / "x.parquet")
    for source, read, empty in (("jsonl", 6, 4), ("parquet", 4, 2)):
        manifest = _prepare(tmp_path, [str(tmp_path / f"x.{source}")], source=source).manifest
        assert (manifest.num_documents_read, manifest.num_empty) == (read, empty)
        assert manifest.splits["train"].num_documents == 2


def test_columns_may_come_late_or_change(tmp_path: Path) -> None:
    """Beyond the 10 MB that a library looks at to learn the columns."""
    filler = [{"n": 1, "filler": "x" * 4000}] * 3000
    rows = [*filler, {"text": "one", "n": "a string"}, {"text": "two", "new": [1]}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (tmp_path / "x.jsonl").stat().st_size > 10 << 20
    manifest = _prepare(tmp_path, str(tmp_path / "x.jsonl")).manifest
    assert (manifest.num_documents_read, manifest.num_empty) == (3002, 3000)


def test_a_column_that_no_row_has_is_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("{}\n" + '{"body": "a", "id": 3}\n' * 12_000 + "{")
    documents = read_documents(_config(tmp_path, str(tmp_path / "x.jsonl")))
    with pytest.raises(UserError, match=r"text_field=text is not a column of .*x\.jsonl, which has body, id; name"):
        next(documents)


def test_a_json_file_may_be_a_list(tmp_path: Path) -> None:
    for number, text in enumerate(('[{"text": "a"},\n {"text": "b"}]', '{\n "text": "c"\n}\n')):
        (tmp_path / f"{number}.json").write_text(text)
    assert _prepare(tmp_path, str(tmp_path / "*.json")).manifest.num_documents_read == 3


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_empty_files_are_passed_over_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    make = _lines if source == "jsonl" else _parquet
    (folder / f"0.{source}").touch()
    (folder / f"1.{source}").write_bytes(make(0, 3))
    (folder / f"2.{source}").write_bytes(b"\n\n" if source == "jsonl" else make(0, 0))
    (folder / f"3.{source}.gz").write_bytes(gzip.compress(b""))
    assert _prepare(tmp_path, str(folder), source=source).manifest.num_documents_read == 3
    empty = ", ".join(str(folder / name) for name in (f"0.{source}", f"2.{source}", f"3.{source}.gz"))
    assert f"note: data.paths: 3 files have nothing in them: {empty}\n" in capsys.readouterr().out


def test_a_path_is_a_path_before_it_is_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "run[1]*?"
    folder.mkdir()
    (folder / "x[0].jsonl").write_bytes(_lines(0, 3))
    for number, path in enumerate((folder, folder / "x[0].jsonl")):
        cache = str(tmp_path / f"cache-{number}")
        assert _prepare(tmp_path, [str(path)], cache_dir=cache).manifest.num_documents_read == 3
    (tmp_path / "run1").mkdir()
    (tmp_path / "run1" / "y.jsonl").write_bytes(_lines(5, 6))
    assert _prepare(tmp_path, [str(tmp_path / "run[0-9]" / "*.jsonl")]).manifest.num_documents_read == 1


@pytest.mark.parametrize(
    ("source", "contents", "message"),
    [
        ("jsonl", _lines(0, 14_000) + b'{"text": \n', r"line 14001 of .* is not JSON"),
        ("jsonl", _lines(0, 5_000) + b'{"text": "\xff"}\n', r"line 5001 of .* is not UTF-8 \(byte 0xff\)"),
        ("jsonl", _lines(0, 2) + b"3\n", r"line 3 of .* is int and no object with columns"),
        ("jsonl", _lines(0, 2) + b'{"text": 3}\n', r"line 3 of .* is not text"),
        ("jsonl", _lines(0, 2) + b'{"text": ' + b"[" * 100_000 + b"\n", r"line 3 of .* is nested too deeply"),
        ("jsonl", b'[{"text": "a"},\n{"text": b}]\n', r"line 2 of .* is not JSON"),
        ("jsonl", gzip.compress(_lines(0, 200))[:-30], r"x cannot be read \(EOFError"),
        ("jsonl", zstandard.compress(_lines(0, 200))[:9] + b"xxxxx", r"x cannot be read \(ZstdError"),
        ("text", b"one\ntwo\n\xe9t\xe9\n", r"line 3 of .* is not UTF-8 \(byte 0xe9\)"),
        ("parquet", _parquet(0, 9)[:-3], r"x cannot be read \(ArrowInvalid"),
        ("parquet", b"PAR1", r"x cannot be read \(ArrowInvalid"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(tmp_path: Path, source: str, contents: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(contents)
    with pytest.raises(UserError, match=message):
        _prepare(tmp_path, str(tmp_path / "x"), source=source)


def test_a_file_that_may_not_be_read_is_found_before_the_first_is_read(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{")
    (tmp_path / "closed").mkdir()
    for name in ("b.jsonl", "closed"):
        (tmp_path / name).chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            # Root may read anything.
            for folder in (tmp_path, *tmp_path.parents[:2]):
                folder.chmod(0o755)
            os.seteuid(65534)
        paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
        with tempfile.TemporaryDirectory() as cache:
            with pytest.raises(UserError, match=r"b\.jsonl cannot be read: Permission denied"):
                _prepare(tmp_path, paths, cache_dir=cache)
            with pytest.raises(UserError, match=r"closed cannot be read: Permission denied"):
                _prepare(tmp_path, [str(tmp_path)], cache_dir=cache)
    finally:
        os.seteuid(user)


def test_the_first_row_of_each_source_is_looked_at_before_any_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(0, 5) + b"{")
    (tmp_path / "b.jsonl").write_text('{"text": 3}\n')
    sources = [
        {"name": name, "weight": 1, "source": "jsonl", "paths": str(tmp_path / f"{name}.jsonl")} for name in "ab"
    ]
    config = DataConfig.model_validate({"mixture": sources, "cache_dir": str(tmp_path / "cache")})
    with pytest.raises(UserError, match=r"data.mixture b: .*line 1 of .*b\.jsonl is not text"):
        prepare_corpus(config)
