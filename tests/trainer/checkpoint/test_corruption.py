"""Damaged checkpoints and data: refused with a sentence, passed over for an older one, or loaded bit for bit.

Never another exception, and never other values. With ``SHARDLINE_CORRUPTION_REPORT=FILE`` the slow tests write what
became of the cases.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from benchmarks.measure.facts import collect_facts
from sharding.engine import Engine
from sharding.part import Part
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.sharding.engine_cases import random_batch, tiny_engine
from tests.support import write_corpus
from tests.trainer.checkpoint.corruption import EVERYWHERE, Draw, Tally, edit_and_seal, fresh_copy
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.inventory import verify_checkpoints
from trainer.checkpoint.manifest import (
    FileEntry,
    Manifest,
    SliceEntry,
    TensorEntry,
    hash_file,
    read_manifest,
    render_manifest,
    write_manifest,
)
from trainer.checkpoint.training_state import TrainingState
from trainer.config import RunConfig, parse_config
from trainer.config.data import DataConfig
from trainer.data.facts import SampleFacts
from trainer.data.packed import PackedSamples
from trainer.data.prepare import prepare_corpus
from trainer.data.prepared import PreparedCorpus, open_prepared
from trainer.run_folder.folder import RunFolder

_REPORT = "SHARDLINE_CORRUPTION_REPORT"
_SHORT, _LONG = 60, 500
_ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
_MODEL = {
    "architecture": "llama",
    "config": {"hidden_size": 6, "intermediate_size": 7, "num_hidden_layers": 1, "num_attention_heads": 1},
}
_LENGTH = 50
_TOKENIZER_TEXT = "def f(x): return x"


def _report(section: str, tally: Tally) -> None:
    path = os.environ.get(_REPORT)
    if path is None:
        return
    file = Path(path)
    found = json.loads(file.read_text()) if file.exists() else {}
    command = f"{_REPORT}=FILE pytest -m slow tests/trainer/checkpoint/test_corruption.py"
    found |= {"command": command, "facts": collect_facts(["torch", "hypothesis"]), section: tally.summary()}
    file.write_text(json.dumps(found, indent=2) + "\n")


def _check(num_cases: int, examine: Callable[[Draw], tuple[str, str]]) -> Tally:
    """Examine so many drawn cases, each of which gives its kind and outcome."""
    tally = Tally()

    @seed(num_cases)
    @settings(max_examples=num_cases, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def cases(data: st.DataObject) -> None:
        tally.add(*examine(data.draw))

    cases()
    return tally


class _Checkpoints:
    """A run with two checkpoints, the newer one of two files, and what is in them."""

    def __init__(self, root: Path) -> None:
        self.original = root / "original"
        self.copy = root / "copy"
        self.config = parse_config({"steps": 4, "model": _MODEL, "parallel": {"strategy": "none"}}, "test")
        self.engine: Engine = tiny_engine(_ALONE, "none", model=_MODEL)
        self.expected: dict[int, tuple[TrainingState, dict[str, torch.Tensor]]] = {}
        folder = RunFolder(self.original)
        for step in (1, 2):
            self.engine.train_batch([random_batch(step)], 20)
            self.engine.clip_grad_norm(1.0)
            self.engine.step(1e-2)
            training = TrainingState(
                step=step,
                num_samples=step,
                num_tokens=20 * step,
                num_skipped_steps=0,
                num_skipped_in_a_row=0,
                schedule_total_steps=4,
                seed=1,
            )
            _checkpointer(self.config, folder, []).save(self.engine, training)
            self.expected[step] = training, {part.name: part.tensor.clone() for part in self._state()}
        _divide(folder.checkpoint_path(2), self._state())

    def _state(self) -> list[Part]:
        return self.engine.state(with_optimizer=True)

    def examine(self, draw: Draw) -> tuple[str, str]:
        folder = RunFolder(fresh_copy(self.original, self.copy))
        kind = draw(st.sampled_from([*EVERYWHERE, "edit_and_seal", "header_and_seal"]))
        newest = folder.checkpoint_path(2)
        if kind == "edit_and_seal":
            edit_and_seal(draw, newest / "manifest.json", ("tensors", "files", "config", "config_fingerprint"))
        elif kind == "header_and_seal":
            _corrupt_header(draw, newest)
        else:
            for step in draw(st.sampled_from([(2,), (2,), (1,), (2, 1)])):
                EVERYWHERE[kind](draw, sorted(folder.checkpoint_path(step).iterdir()))
        for part in self._state():
            part.tensor.fill_(-7)
        warnings: list[str] = []
        try:
            training = _checkpointer(self.config, folder, warnings).resume(self.engine)
        except UserError as error:
            return kind, "refused" if str(error) else "no sentence"
        if training is None:
            # Without its manifest a checkpoint does not exist.
            assert kind == "remove"
            assert not list(self.copy.rglob("manifest.json"))
            return kind, "no checkpoint"
        expected_training, expected = self.expected[training.step]
        assert training == expected_training
        for part in self._state():
            assert part.tensor.numpy().tobytes() == expected[part.name].numpy().tobytes(), part.name
        if training.step == 2:
            return kind, "unchanged"
        assert warnings or not (self.copy / "checkpoints" / "step-00000002" / "manifest.json").is_file()
        return kind, "older checkpoint"


def _checkpointer(config: RunConfig, folder: RunFolder, warnings: list[str]) -> Checkpointer:
    return Checkpointer(config, folder, lambda _: "data", _ALONE, lambda: None, warn=warnings.append)


def _divide(folder: Path, parts: list[Part]) -> None:
    """Write a checkpoint anew as two ranks would have: each has half of the rows."""
    manifest = read_manifest(folder)
    tensors = {
        part.name: TensorEntry(dtype=str(part.tensor.dtype)[6:], shape=list(part.global_shape), slices=[])
        for part in parts
    }
    files = {}
    for rank in range(2):
        name, contents = f"rank-{rank:05d}.safetensors", {}
        for part in parts:
            rows = part.global_shape[0] if part.global_shape else 1
            start, stop = (0, (rows + 1) // 2) if rank == 0 else ((rows + 1) // 2, rows)
            if start == stop:
                continue
            half = part.tensor[start:stop].clone() if part.global_shape else part.tensor.clone()
            offsets = [start, *(0 for _ in part.global_shape[1:])] if part.global_shape else []
            contents[f"{part.name}@{rank}"] = half
            tensors[part.name].slices.append(
                SliceEntry(file=name, key=f"{part.name}@{rank}", offsets=offsets, shape=list(half.shape))
            )
        save_file(contents, folder / name)
        files[name] = FileEntry(num_bytes=(folder / name).stat().st_size, sha256=hash_file(folder / name))
    write_manifest(folder, manifest.model_copy(update={"tensors": tensors, "files": files, "num_ranks": 2}))


def _corrupt_header(draw: Draw, folder: Path) -> None:
    """Change a safetensors header, with sizes and hashes that fit again."""
    file = folder / "rank-00001.safetensors"
    contents = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(contents[:8], "little")
    contents[draw(st.integers(0, header - 1))] ^= 1 << draw(st.integers(0, 7))
    file.write_bytes(contents)
    manifest: Manifest = read_manifest(folder)
    entry = FileEntry(num_bytes=len(contents), sha256=hash_file(file))
    sealed = manifest.model_copy(update={"files": manifest.files | {file.name: entry}})
    (folder / "manifest.json").write_bytes(render_manifest(sealed))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> _Checkpoints:
    return _Checkpoints(tmp_path_factory.mktemp("checkpoints"))


def _expect_all_outcomes(tally: Tally, *outcomes: str) -> None:
    """A test of corruption that corrupts nothing, or of a loader that refuses everything, would prove nothing."""
    summary = tally.summary()
    assert "no sentence" not in summary["outcomes"]
    assert set(summary["outcomes"]) >= set(outcomes), summary


def test_a_corrupt_checkpoint_is_never_loaded(checkpoints: _Checkpoints) -> None:
    _expect_all_outcomes(_check(_SHORT, checkpoints.examine), "older checkpoint", "unchanged")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_corrupt_checkpoints_in_many_cases(checkpoints: _Checkpoints) -> None:
    tally = _check(_LONG, checkpoints.examine)
    _expect_all_outcomes(tally, "older checkpoint", "unchanged", "refused")
    _report("checkpoint", tally)


class _Corpus:
    """A prepared corpus of several shards, and all that can be read from it."""

    def __init__(self, root: Path) -> None:
        self.config = DataConfig(
            source="text",
            paths=(str(write_corpus(root / "documents", 12)),),
            vocab_size=300,
            shard_tokens=2048,
            validation_fraction=0.2,
            cache_dir=str(root / "cache"),
        )
        corpus = prepare_corpus(self.config, progress=False)
        assert isinstance(corpus, PreparedCorpus)
        self.original = corpus.folder
        self.copy = root / "copy"
        self.expected = _contents(corpus)

    def examine(self, draw: Draw) -> tuple[str, str]:
        folder = fresh_copy(self.original, self.copy)
        kind = draw(st.sampled_from([*EVERYWHERE, "edit_and_seal"]))
        if kind == "edit_and_seal":
            edit_and_seal(draw, folder / "manifest.json", ("splits", "tokenizer_files", "preparation_version"))
        else:
            EVERYWHERE[kind](draw, sorted(path for path in folder.rglob("*") if path.is_file()))
        try:
            corpus = open_prepared(folder, self.config)
            found = None if corpus is None else _contents(corpus)
        except UserError as error:
            return kind, "refused" if str(error) else "no sentence"
        if found is None:
            assert not (folder / "manifest.json").exists()
            return kind, "no corpus"
        assert found.keys() == self.expected.keys()
        for name, value in found.items():
            assert np.array_equal(value, self.expected[name]), name
        return kind, "unchanged"


def _contents(corpus: Any) -> dict[str, Any]:
    from tokenizers import Tokenizer

    contents: dict[str, Any] = {"fingerprint": corpus.fingerprint}
    for split in ("train", "validation"):
        stream = corpus.stream(split)
        samples = PackedSamples(lambda _, stream=stream: stream, SampleFacts(_LENGTH), document_mask=True)
        batch = samples.read(split, list(range(samples.num_samples(split))))
        contents |= {f"{split} {name}": tensor.numpy() for name, tensor in batch.items()}
        contents[f"{split} documents"] = [
            (span.source_id, span.start, span.stop) for span in stream.documents_between(0, stream.num_tokens)
        ]
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_dir / "tokenizer.json"))
    contents["tokenizer"] = tokenizer.encode(_TOKENIZER_TEXT).ids
    return contents


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> _Corpus:
    return _Corpus(tmp_path_factory.mktemp("corpus"))


def test_corrupt_data_is_never_read(corpus: _Corpus) -> None:
    _expect_all_outcomes(_check(_SHORT, corpus.examine), "refused", "unchanged")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_corrupt_data_in_many_cases(corpus: _Corpus) -> None:
    tally = _check(_LONG, corpus.examine)
    _expect_all_outcomes(tally, "refused", "unchanged", "no corpus")
    _report("data", tally)


def test_a_corpus_without_its_manifest_is_prepared_again(corpus: _Corpus) -> None:
    (corpus.original / "manifest.json").unlink()
    assert prepare_corpus(corpus.config, progress=False).fingerprint == corpus.expected["fingerprint"]


def test_verify_names_each_corrupt_checkpoint_and_moves_none(
    checkpoints: _Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDLINE_CACHE", str(tmp_path))
    folder = RunFolder(fresh_copy(checkpoints.original, checkpoints.copy))
    (folder.checkpoint_path(1) / "notes.txt").touch()
    first, second = [one.line() for one in verify_checkpoints(folder.checkpoints_dir)]
    assert first.startswith("step-00000001: complete; its corpus is not prepared here")
    assert first.endswith("not part of it: notes.txt")
    assert second.startswith("step-00000002: complete")

    manifest = folder.checkpoint_path(2) / "manifest.json"
    contents = manifest.read_bytes()
    manifest.write_bytes(contents.replace(b'"num_samples": 2', b'"num_samples": 3'))
    before = sorted(folder.path.rglob("*"))
    first_one, second_one = verify_checkpoints(folder.checkpoints_dir)
    assert (first_one.status, second_one.status) == ("complete", "corrupt")
    sentence = "is corrupt: manifest.json: its contents do not have the SHA-256 that it says"
    assert sentence in second_one.line()
    assert sorted(folder.path.rglob("*")) == before
