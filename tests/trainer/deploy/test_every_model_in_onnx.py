"""Every kind of model in ONNX Runtime, without torch, beside torch's own numbers."""

from pathlib import Path

import pytest

from tests.support import run_on_ranks
from tests.trainer.deploy.elsewhere import max_errors_elsewhere
from tests.trainer.deploy.small_runs import LONGEST, train_small_runs
from trainer.checkpoint.reader import open_checkpoint
from trainer.deploy.export import ExportOptions, export_run

_KINDS = ("mlp", "cnn", "lstm", "bert", "modernbert", "vit", "llama", "gpt2")
_OTHERS = ("masked", "decoder", "ratings", "sounds", "wav2vec2")
_SIZES = [(1, LONGEST), (257, LONGEST), (1, 1), (3, 2), (5, 9), (2, 17)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_onnx_computes_what_torch_does(tmp_path: Path) -> None:
    names = (*_KINDS, *_OTHERS)
    run_on_ranks(train_small_runs, 1, tmp_path, {name: {} for name in names}, timeout_s=300)
    exports = {}
    for name in names:
        run = tmp_path / "runs" / name
        found = export_run(open_checkpoint(str(run), None), tmp_path / name, ExportOptions(format="onnx"))
        assert found is not None
        assert [spec.shape[0] for spec in found.inputs + found.outputs] == ["batch"] * (len(found.inputs) + 1), name
        assert not (tmp_path / name / "model.onnx.data").exists()
        exports[name] = (run, tmp_path / name)
    errors = max_errors_elsewhere(exports, _SIZES)
    assert {name: max(found) for name, found in errors.items() if max(found) > 1e-4} == {}
    assert len(errors) == len(names)
