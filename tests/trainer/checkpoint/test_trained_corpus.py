"""Which corpus a run goes on with: that of its checkpoint, or of another run's where both name the same one."""

from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny_values, write_empty_checkpoint
from trainer.checkpoint.manifest import read_manifest, write_manifest
from trainer.checkpoint.trained_corpus import trained_fingerprint
from trainer.config import RunConfig, parse_config
from trainer.run_folder.folder import RunFolder


def _config(tmp_path: Path, name: str, checkpoint: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    values = tiny_values(tmp_path / "runs", tmp_path / "cache", tmp_path / "documents") | {"name": name}
    values["data"] |= data
    return parse_config(values | {"checkpoint": checkpoint or {}}, name)


def _checkpoint(config: RunConfig, step: int, data_fingerprint: str) -> None:
    folder = write_empty_checkpoint(config.run_dir / "checkpoints" / f"step-{step:08d}", step)
    update = {"data_fingerprint": data_fingerprint, "config": config.model_dump(mode="json")}
    write_manifest(folder, read_manifest(folder).model_copy(update=update))


def _fingerprint(config: RunConfig) -> str | None:
    return trained_fingerprint(config, RunFolder.of(config))


def test_a_run_has_the_corpus_of_its_newest_readable_checkpoint(tmp_path: Path) -> None:
    config = _config(tmp_path, "first")
    assert _fingerprint(config) is None
    _checkpoint(config, 1, "one")
    _checkpoint(config, 2, "two")
    assert _fingerprint(config) == "two"
    assert _fingerprint(_config(tmp_path, "first", paths=["elsewhere"])) is None
    (config.run_dir / "checkpoints" / "step-00000002" / "manifest.json").write_text("{")
    assert _fingerprint(config) == "one"


@pytest.mark.parametrize(
    ("load", "data", "expected"),
    [
        ("all", {}, "one"),
        ("all", {"cache_dir": "elsewhere", "num_workers": 3, "skip_samples": [[5, 6]]}, "one"),
        # Another corpus was asked for: to train on the old one would be to ignore it.
        ("all", {"paths": ["elsewhere"]}, None),
        ("all", {"tokenizer": "other"}, None),
        ("weights", {}, None),
    ],
)
def test_a_fork_has_the_corpus_of_its_origin_where_it_names_the_same(
    tmp_path: Path, load: str, data: dict[str, Any], expected: str | None
) -> None:
    first = _config(tmp_path, "first")
    _checkpoint(first, 1, "one")
    assert _fingerprint(_config(tmp_path, "fork", {"from": str(first.run_dir), "load": load}, **data)) == expected
