"""Every kind of model in ONNX Runtime, without torch, beside torch's own numbers; and a model with adapters."""

from pathlib import Path
from typing import Any

import pytest

from sharding.ranks.errors import UserError
from shardline import Run
from tests.support import run_on_ranks
from tests.trainer.deploy.elsewhere import max_errors_elsewhere
from tests.trainer.deploy.small_runs import LONGEST, train_small_runs
from trainer.checkpoint.reader import open_checkpoint
from trainer.deploy.export import ExportOptions, export_run
from trainer.deploy.signature import read_deployment

_KINDS = ("mlp", "cnn", "lstm", "bert", "modernbert", "vit", "llama", "gpt2")
_OTHERS = ("masked", "decoder", "ratings", "sounds", "wav2vec2")
_ADAPTED: dict[str, Any] = {"model": {"lora": {"rank": 2}}, "checkpoint": {"from": "llama", "load": "weights"}}
_SIZES = [(1, LONGEST), (257, LONGEST), (1, 1), (3, 2), (5, 9), (2, 17)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``train_small_runs``."""
    folder = tmp_path_factory.mktemp("exports")
    runs = {name: {} for name in (*_KINDS, *_OTHERS)} | {"llama-lora": _ADAPTED}
    run_on_ranks(train_small_runs, 1, folder, runs, timeout_s=600)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_onnx_computes_what_torch_does(root: Path, tmp_path: Path) -> None:
    exports = {}
    for name in (*_KINDS, *_OTHERS):
        run = root / "runs" / name
        found = export_run(open_checkpoint(str(run), None), tmp_path / name, ExportOptions(format="onnx"))
        assert found is not None
        assert [spec.shape[0] for spec in found.inputs + found.outputs] == ["batch"] * (len(found.inputs) + 1), name
        assert not (tmp_path / name / "model.onnx.data").exists()
        exports[name] = (run, tmp_path / name)
    errors = max_errors_elsewhere(exports, _SIZES)
    assert {name: found for name, found in errors.items() if max(found) > 1e-4} == {}
    assert [len(found) for found in errors.values()] == [len(_SIZES)] * len(exports)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_language_model_with_merged_adapters_scores(root: Path, tmp_path: Path) -> None:
    run = Run(root / "runs" / "llama-lora")
    with pytest.raises(UserError, match="give --merge for a whole model"):
        run.export(tmp_path / "program", format="torch-export")
    run.export(tmp_path / "program", format="torch-export", form="merged")
    found = read_deployment(tmp_path / "program")
    assert [(spec.name, spec.shape) for spec in found.inputs + found.outputs] == [
        ("input_ids", ["batch", "length"]),
        ("logits", ["batch", "length", 301]),
    ]
    assert (found.output_kind, found.max_length) == ("tokens", 64)
    assert "no cache" in (tmp_path / "program" / "README.md").read_text()
    with pytest.raises(UserError, match="--format torch-export --adapter: adapters alone are written as peft loads"):
        run.export(tmp_path / "no", format="torch-export", form="adapter")
