"""Preparation: what becomes of documents, and that nothing half-done is ever taken for a corpus."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharding.ranks.errors import UserError
from tests.support import ROOT, command_environment, processes_of, tiny_values, wait_until, write_config, write_corpus
from trainer.config.data import DataConfig
from trainer.data.corpus import clean_text
from trainer.data.identity import corpus_folder
from trainer.data.prepare import prepare_corpus
from trainer.data.prepared import PreparedCorpus, find_prepared, is_of_present_source

TEXTS = ["first\r\ndocument", "  \n", "second document", "cafe\u0301", "second document", "caf\u00e9", "last"]


def _config(tmp_path: Path, **settings: Any) -> DataConfig:
    defaults = {"source": "jsonl", "paths": [str(tmp_path / "x.jsonl")], "vocab_size": 300, "validation_fraction": 0.0}
    return DataConfig.model_validate(defaults | {"cache_dir": str(tmp_path / "cache")} | settings)


def _write_jsonl(path: Path, texts: list[str], column: str = "text") -> None:
    path.write_text("".join(json.dumps({column: text, "id": number}) + "\n" for number, text in enumerate(texts)))


def _texts(corpus: PreparedCorpus, split: str = "train") -> dict[str, str]:
    """Source id to text of every document of a split, decoded from the shards."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_dir)
    stream = corpus.stream(split)
    found = {}
    for span in stream.documents_between(0, stream.num_tokens) if stream.num_tokens else []:
        *tokens, last = stream.read(span.start, span.stop).tolist()
        assert last == corpus.eos_token_id
        found[span.source_id] = tokenizer.decode(tokens)
    return found


def test_documents_are_normalised_and_empty_ones_and_duplicates_dropped(tmp_path: Path) -> None:
    _write_jsonl(tmp_path / "x.jsonl", TEXTS)
    corpus = prepare_corpus(_config(tmp_path), progress=False)
    manifest = corpus.manifest
    assert (manifest.num_documents_read, manifest.num_empty, manifest.num_duplicates) == (7, 1, 2)
    assert list(_texts(corpus).values()) == ["first\ndocument", "second document", "caf\u00e9", "last"]
    assert [name.rpartition("#")[2] for name in _texts(corpus)] == ["0", "2", "3", "6"]
    assert clean_text("a\r\nb", "none") == "a\r\nb"


def test_parquet_and_text_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    pq.write_table(pa.table({"body": ["one text", "another text"]}), folder / "a.parquet")
    parquet = _config(tmp_path, source="parquet", paths=[str(folder)], text_field="body")
    assert list(_texts(prepare_corpus(parquet, progress=False)).values()) == ["one text", "another text"]
    for name in ("b", "c"):
        (folder / f"{name}.txt").write_text(f"text of\n{name}\n")
    text = _config(tmp_path, source="text", paths=[str(folder / "*.txt")])
    found = _texts(prepare_corpus(text, progress=False))
    assert list(found) == [str(folder / "b.txt"), str(folder / "c.txt")]
    assert list(found.values()) == ["text of\nb\n", "text of\nc\n"]


def test_the_division_depends_on_the_text_alone(tmp_path: Path) -> None:
    texts = [f"document number {number}" for number in range(200)]
    _write_jsonl(tmp_path / "x.jsonl", texts[:150])
    fewer = prepare_corpus(_config(tmp_path, validation_fraction=0.2), progress=False)
    _write_jsonl(tmp_path / "x.jsonl", texts)
    more = prepare_corpus(_config(tmp_path, validation_fraction=0.2), progress=False)
    held_out = set(_texts(fewer, "validation").values())
    assert 10 < len(held_out) < 60
    assert held_out == set(_texts(more, "validation").values()) & set(texts[:150])
    assert not held_out & set(_texts(more).values())
    assert fewer.fingerprint != more.fingerprint


def test_a_split_that_is_asked_for_is_never_empty(tmp_path: Path) -> None:
    _write_jsonl(tmp_path / "x.jsonl", ["one", "two"])
    for fraction in (1e-9, 0.999999):
        corpus = prepare_corpus(_config(tmp_path, validation_fraction=fraction), progress=False)
        assert [corpus.manifest.splits[name].num_documents for name in ("train", "validation")] == [1, 1]


def test_streams_cross_shards(tmp_path: Path) -> None:
    write_corpus(tmp_path / "documents")
    small = _config(tmp_path, source="text", paths=[str(tmp_path / "documents")], shard_tokens=1024)
    whole = small.model_copy(update={"shard_tokens": 1 << 20})
    many, one = (prepare_corpus(config, progress=False).stream("train") for config in (small, whole))
    assert len(prepare_corpus(small, progress=False).manifest.splits["train"].shards) > 5
    assert many.num_tokens == one.num_tokens
    for start, stop in ((0, one.num_tokens), (1000, 1050), (500, 4000), (1024, 2048), (7, 7)):
        assert many.read(start, stop).tolist() == one.read(start, stop).tolist()


def test_doing_it_again_does_nothing(tmp_path: Path) -> None:
    _write_jsonl(tmp_path / "x.jsonl", TEXTS)
    config = _config(tmp_path)
    assert find_prepared(config) is None
    first = prepare_corpus(config, progress=False)
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    assert prepare_corpus(config, progress=False).folder == first.folder
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before
    # A folder of its own for everything that changes the outcome, and only for that.
    assert corpus_folder(config.model_copy(update={"vocab_size": 299})) != first.folder
    assert corpus_folder(config.model_copy(update={"sequence_length": 9, "num_workers": 1})) == first.folder
    os.utime(tmp_path / "x.jsonl")
    assert corpus_folder(config) != first.folder


def _prepare_command(config: Path) -> list[str]:
    return [sys.executable, "-m", "trainer.commands.prepare_data", str(config)]


def _slow_config(tmp_path: Path, name: str) -> Path:
    """Python's standard library, which takes seconds."""
    values = tiny_values(tmp_path / "runs", tmp_path / name, tmp_path)
    values["data"] = {"source": "python-stdlib", "vocab_size": 1000, "max_documents": 250}
    values["data"] |= {"cache_dir": str(tmp_path / name)}
    return write_config(tmp_path / f"{name}.yaml", values)


@pytest.mark.timing
@pytest.mark.timeout(200)
def test_killed_half_way_and_then_two_at_once(tmp_path: Path) -> None:
    options: dict[str, Any] = {"cwd": ROOT, "env": command_environment(), "stdout": subprocess.DEVNULL}
    undisturbed, killed = _slow_config(tmp_path, "undisturbed"), _slow_config(tmp_path, "killed")
    subprocess.run(_prepare_command(undisturbed), check=True, **options)
    process = subprocess.Popen(_prepare_command(killed), **options)
    corpora = tmp_path / "killed" / "corpora"
    wait_until(lambda: list(corpora.glob("*.partial-*/documents.spool")), what="work in progress")
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(corpora.glob("*.partial-*"))
    assert not list(corpora.glob("*/manifest.json")) or list(corpora.glob("*.partial-*/manifest.json"))
    both = [subprocess.Popen(_prepare_command(killed), **options) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert not list(corpora.glob("*.partial-*"))
    manifests = [
        PreparedCorpus(next((tmp_path / name / "corpora").glob("*/manifest.json")).parent)
        for name in ("undisturbed", "killed")
    ]
    assert manifests[0].fingerprint == manifests[1].fingerprint
    assert manifests[0].manifest == manifests[1].manifest
    assert processes_of(tmp_path / "runs" / "x") == {}


def test_a_corrupt_corpus(tmp_path: Path) -> None:
    _write_jsonl(tmp_path / "x.jsonl", TEXTS)
    config = _config(tmp_path)
    corpus = prepare_corpus(config, progress=False)
    corpus.verify()
    shard = corpus.folder / "train-00000.bin"
    contents = shard.read_bytes()
    shard.write_bytes(contents[:-1])
    with pytest.raises(UserError, match=f"train-00000.bin has {len(contents) - 1} bytes instead of {len(contents)}"):
        find_prepared(config)
    shard.write_bytes(bytes([contents[0] ^ 1]) + contents[1:])
    with pytest.raises(UserError, match="does not have the SHA-256"):
        PreparedCorpus(corpus.folder).verify()
    (corpus.folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is corrupt"):
        find_prepared(config)


@pytest.mark.parametrize(
    ("settings", "contents", "message"),
    [
        ({"paths": ["/nowhere/x.jsonl"]}, None, "data.paths: /nowhere/x.jsonl names no file"),
        ({}, '{"text": ""}\n', "the corpus is empty"),
        ({"text_field": "body"}, '{"text": "x"}\n', "data.text_field=body is not a column"),
        ({"text_field": "n"}, '{"n": 3}\n', r"line 1 of .*x\.jsonl is not text"),
        ({}, '{"text": "x"}\n\n{"text": \n', r"line 3 of .*x\.jsonl is not JSON \(Expecting value at character 9\)"),
        ({"tokenizer": "./nofolder"}, '{"text": \n', r"data.tokenizer=./nofolder cannot be loaded \(there is no such"),
        ({"tokenizer": "/nowhere/tokenizer"}, '{"text": "x"}\n', "data.tokenizer=/nowhere/tokenizer cannot be loaded"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, settings: dict[str, Any], contents: str | None, message: str
) -> None:
    if contents is not None:
        (tmp_path / "x.jsonl").write_text(contents)
    with pytest.raises(UserError, match=message):
        prepare_corpus(_config(tmp_path, **settings), progress=False)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.name != "corpora"]


def test_a_local_tokenizer_is_taken_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_jsonl(tmp_path / "x.jsonl", TEXTS)
    trained = prepare_corpus(_config(tmp_path), progress=False)
    reused = prepare_corpus(_config(tmp_path, tokenizer=str(trained.tokenizer_dir)))
    assert (
        f"note: data.vocab_size=300 has no effect: data.tokenizer={trained.tokenizer_dir} has"
        in capsys.readouterr().out
    )
    assert reused.folder != trained.folder
    assert reused.manifest.tokenizer_sha256 == trained.manifest.tokenizer_sha256
    assert reused.fingerprint == trained.fingerprint


def test_looking_for_a_corpus_loads_no_heavy_library() -> None:
    code = (
        "import sys; from trainer.config.data import DataConfig; from trainer.data.prepared import find_prepared; "
        "find_prepared(DataConfig(cache_dir='/nowhere')); "
        "print(sorted({'torch', 'datasets', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=command_environment(), check=True
    )
    assert finished.stdout.strip() == "[]"


def test_what_was_prepared_is_found_by_its_fingerprint(tmp_path: Path) -> None:
    _write_jsonl(tmp_path / "x.jsonl", TEXTS)
    config = _config(tmp_path)
    first = prepare_corpus(config, progress=False)
    found = find_prepared(config, first.fingerprint)
    assert found is not None
    assert found.folder == first.folder
    # Touched, moved, changed: what a run began with is still there.
    os.utime(tmp_path / "x.jsonl")
    assert find_prepared(config) is None
    for change in (lambda: None, (tmp_path / "x.jsonl").unlink, lambda: _write_jsonl(tmp_path / "x.jsonl", TEXTS[:2])):
        change()
        found = prepare_corpus(config, progress=False, fingerprint=first.fingerprint)
        assert found.folder == first.folder
        assert not is_of_present_source(found, config)
    # A run that begins now reads what is there now.
    second = prepare_corpus(config, progress=False)
    assert second.fingerprint != first.fingerprint
    assert is_of_present_source(second, config)
    assert prepare_corpus(config, progress=False, fingerprint=first.fingerprint).folder == first.folder
    (tmp_path / "x.jsonl").unlink()
    with pytest.raises(UserError, match="names no file"):
        prepare_corpus(config, progress=False, fingerprint="0" * 64)


def test_a_mixture_is_found_by_its_fingerprint(tmp_path: Path) -> None:
    sources = []
    for name, texts in (("one", TEXTS), ("two", ["something else", "and more"])):
        _write_jsonl(tmp_path / f"{name}.jsonl", texts)
        sources.append({"name": name, "weight": 1, "source": "jsonl", "paths": str(tmp_path / f"{name}.jsonl")})
    settings = {"mixture": sources, "vocab_size": 300, "cache_dir": str(tmp_path / "cache")}
    config = DataConfig.model_validate(settings)
    first = prepare_corpus(config, progress=False)
    (tmp_path / "two.jsonl").unlink()
    found = find_prepared(config, first.fingerprint)
    assert found is not None
    assert found.folder == first.folder


@pytest.mark.parametrize(
    "limit_bytes",
    # At the texts, and at the tokenizer, which native code writes.
    [20, 4_000],
)
def test_whatever_keeps_it_from_writing_is_a_sentence(tmp_path: Path, limit_bytes: int) -> None:
    """Files must not grow beyond a limit, which is another error than that of a full disk."""
    _write_jsonl(tmp_path / "x.jsonl", [f"document {number}" for number in range(10)])
    config = _config(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be prepared in .*corpora: File too large; free some space \(or"):
            prepare_corpus(config, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in (tmp_path / "cache" / "corpora").iterdir() if path.is_dir()]
    assert prepare_corpus(config, progress=False).corpora[0].manifest.num_documents_read == 10
