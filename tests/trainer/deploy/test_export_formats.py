"""What leaves as ONNX, as a program of torch.export, or for transformers computes elsewhere what was trained."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from sharding.ranks.errors import UserError
from shardline import Run
from tests.support import ROOT, read_metrics, run_on_ranks
from tests.trainer.deploy import own_network
from tests.trainer.deploy.elsewhere import drawn_inputs, max_errors_elsewhere, trained_logits
from tests.trainer.deploy.small_runs import LONGEST, OWN, train_small_runs
from trainer.checkpoint.reader import CheckpointReader, open_checkpoint
from trainer.commands import export as export_command
from trainer.commands.prune import main as prune_main
from trainer.deploy import export, hf_folder
from trainer.deploy.allowed_code import AllowedCode
from trainer.deploy.export import ExportOptions, export_run
from trainer.deploy.signature import Deployment, TensorSpec, read_deployment

_RUNS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "bert": {"optimizer": {"ema_decay": 0.5}},
    "own": {},
    "own-counting": {"model": {"factory": f"{OWN}:counting"}},
    "own-decomposing": {"model": {"factory": f"{OWN}:decomposing"}},
    # Its weights grow beyond what half precision holds.
    "mlp-wild": {"model": {"arguments": {"hidden_sizes": [32]}}, "optimizer": {"lr": 3000.0}},
}
_OWN = AllowedCode(f"{OWN}:IsAbove", factories=(f"{OWN}:counting", f"{OWN}:decomposing", f"{OWN}:Pairs"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``train_small_runs``."""
    folder = tmp_path_factory.mktemp("exports")
    run_on_ranks(train_small_runs, 1, folder, _RUNS, timeout_s=300)
    return folder


def _reader(root: Path, name: str) -> CheckpointReader:
    return open_checkpoint(str(root / "runs" / name), None)


def _exported(root: Path, name: str, to: Path, **options: Any) -> Deployment:
    found = export_run(_reader(root, name), to, ExportOptions(**options))
    assert found is not None
    assert found == read_deployment(to)
    return found


def test_a_classifier_in_onnx(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    found = _exported(root, "mlp", folder, format="onnx")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "deployment.json", "model.onnx", "rows.json"]
    assert found.inputs == [TensorSpec(name="pixel_values", dtype="float32", shape=["batch", 1, 8, 8])]
    assert found.outputs == [TensorSpec(name="logits", dtype="float32", shape=["batch", 10])]
    assert (found.output_kind, found.classes[:2], found.max_length) == ("classes", ["0", "1"], None)
    assert found.normalize is None
    quality = found.quality
    assert quality is not None
    assert quality.split == "validation"
    assert quality.max_abs_error is not None
    assert quality.max_abs_error <= 1e-4
    logged = read_metrics(root / "runs" / "mlp")[-1]
    for name, value in quality.trained.items():
        assert value == pytest.approx(logged[f"eval/{name}"], abs=1e-6), name
        assert value == pytest.approx(quality.exported[name], abs=1e-6), name
    card = (folder / "README.md").read_text()
    fingerprint = _reader(root, "mlp").manifest.data_fingerprint
    for part in (fingerprint, "hidden_sizes", "| accuracy |", str(found.run.revision), "step 2"):
        assert part in card
    for place in (str(root), str(ROOT), sys.prefix):
        assert all(place.encode() not in path.read_bytes() for path in folder.iterdir()), place
    errors = max_errors_elsewhere({"mlp": (root / "runs" / "mlp", folder)}, [(1, 0), (257, 0)])
    assert max(errors["mlp"]) <= 1e-4


@pytest.mark.slow
def test_weights_that_one_file_cannot_hold_lie_beside_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1000)
    found = _exported(root, "mlp", tmp_path / "onnx", format="onnx")
    assert found.quality is not None
    assert found.quality.max_abs_error is not None
    assert found.quality.max_abs_error <= 1e-4
    assert (tmp_path / "onnx" / "model.onnx.data").stat().st_size > (tmp_path / "onnx" / "model.onnx").stat().st_size
    errors = max_errors_elsewhere({"mlp": (root / "runs" / "mlp", tmp_path / "onnx")}, [(3, 0)])
    assert max(errors["mlp"]) <= 1e-4


def test_a_text_classifier_as_a_program(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "program"
    found = _exported(root, "bert", folder, format="torch-export")
    assert [(spec.name, spec.shape) for spec in found.inputs] == [
        ("input_ids", ["batch", "length"]),
        ("attention_mask", ["batch", "length"]),
    ]
    assert (found.file, found.max_length, found.normalize) == ("model.pt2", LONGEST, "NFC")
    assert all(str(ROOT).encode() not in path.read_bytes() for path in folder.iterdir())
    program = torch.export.load(folder / "model.pt2").module()
    compute = trained_logits(root / "runs" / "bert", tmp_path / "work")
    for sizes in ((1, 1), (1, 7), (257, LONGEST), (3, 2)):
        inputs = drawn_inputs(found, *sizes)
        assert torch.allclose(program(**inputs), compute(inputs), atol=1e-5), sizes


def test_averaged_weights_in_half_the_bytes(root: Path, tmp_path: Path) -> None:
    found = _exported(root, "bert", tmp_path / "average", dtype="bf16", averaged=True)
    assert found.run.averaged
    model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "average", output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.bfloat16
    reader = _reader(root, "bert")
    for name, tensor in load_file(tmp_path / "average" / "model.safetensors").items():
        assert torch.equal(tensor, reader.read_parameter(name, averaged=True).to(torch.bfloat16)), name


@pytest.mark.parametrize("file_format", ["onnx", "torch-export"])
def test_a_module_of_ones_own(root: Path, tmp_path: Path, file_format: str) -> None:
    run = Run(root / "runs" / "own")
    own = {"task": own_network.IsAbove, "model": own_network.network, "samples": own_network.Pairs}
    run.export(tmp_path / "own", format=file_format, **own)  # type: ignore[arg-type]
    found = read_deployment(tmp_path / "own")
    assert [spec.name for spec in found.inputs] == ["left", "right"]
    assert (found.output_kind, found.task) == ("values", f"{OWN}:IsAbove")
    assert found.quality is not None
    assert (found.quality.num_samples, found.quality.split) == (33, "validation")
    with pytest.raises(UserError, match=r"trains .*_Bilinear, which is no model of transformers.*give --format onnx"):
        run.export(tmp_path / "hf", **own)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"--factory {OWN}:Pairs to run it"):
        run.export(tmp_path / "hf", format=file_format, task=own["task"], model=own["model"])  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_module_of_ones_own_is_pruned_where_its_code_is_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(root / "runs" / "own"), "--to", str(tmp_path / "half"), "--task", f"{OWN}:IsAbove"]
    assert prune_main(arguments) == 2
    assert f"give --factory {OWN}:network to run it" in capsys.readouterr().err
    assert prune_main([*arguments, "--factory", f"{OWN}:network"]) == 0
    assert (tmp_path / "half" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "own-counting",
            r"--format onnx cannot hold Counting: torch\.export says .* data-dependent .*; give --format hf",
        ),
        ("own-decomposing", r"--format onnx cannot hold this model: .*eigh.*; give --format torch-export, or"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_in_a_sentence(
    root: Path, tmp_path: Path, name: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=reason) as refusal:
        export_run(_reader(root, name), tmp_path / "onnx", ExportOptions(format="onnx", allowed=_OWN))
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


def test_another_model_than_was_trained_leaves_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = hf_folder.write_hf_folder

    def write_wrongly(trained: Any, work: Path, *rest: Any) -> None:
        written(trained, work, *rest)
        tensors = load_file(work / "model.safetensors")
        tensors["classifier.bias"][0] += 1e-3
        save_file(tensors, work / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(export, "write_hf_folder", write_wrongly)
    arguments = [str(root / "runs" / "bert"), "--to", str(tmp_path / "model")]
    assert export_command.main(arguments) == 2
    said = capsys.readouterr().err
    assert "logits differ by up to 0.001" in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert export_command.main([*arguments, "--accept-loss"]) == 0
    assert "logits differ by 0.001 at most, loss is" in capsys.readouterr().out
    assert (read_deployment(tmp_path / "model").quality or Any).max_abs_error == pytest.approx(1e-3, rel=1e-2)


def test_half_precision_that_costs_too_much_is_refused(root: Path, tmp_path: Path) -> None:
    options = {"format": "torch-export", "dtype": "fp16"}
    with pytest.raises(UserError, match=r"fp16 costs too much: loss is (nan|inf) .* at most 0\.5 % .*--accept-loss"):
        export_run(_reader(root, "mlp-wild"), tmp_path / "model", ExportOptions(**options))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    found = _exported(root, "mlp-wild", tmp_path / "model", **options, accept_loss=True)
    assert found.quality is not None
    assert found.quality.max_abs_error is None


def test_a_format_that_the_runtime_has_no_kernel_for_is_refused(root: Path, tmp_path: Path) -> None:
    reason = r"onnxruntime cannot run model\.onnx in bf16: .*not find an implementation.*; give another --dtype, or "
    # Not even where losses are accepted: what nothing runs is no model.
    options = ExportOptions(format="onnx", dtype="bf16", accept_loss=True)
    with pytest.raises(UserError, match=reason) as refusal:
        export_run(_reader(root, "mlp-wild"), tmp_path / "onnx", options)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_where_the_data_is_gone_drawn_samples_take_its_place(root: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(root / "runs" / "bert", moved / "runs" / "bert")
    reader = open_checkpoint(str(moved / "runs" / "bert"), None)
    texts = root / "texts.jsonl"
    texts.rename(root / "elsewhere.jsonl")
    cache = (root / "cache").rename(root / "cache-elsewhere")
    try:
        found = export_run(reader, tmp_path / "model", ExportOptions())
        assert found is not None
        assert found.quality is not None
        assert (found.quality.split, found.quality.metric) == ("generated", None)
        with pytest.raises(UserError, match="the run's own samples are not there, so that nobody knows what is lost"):
            export_run(reader, tmp_path / "half", ExportOptions(dtype="bf16"))
    finally:
        (root / "elsewhere.jsonl").rename(texts)
        cache.rename(root / "cache")
    assert "drawn samples" in (tmp_path / "model" / "README.md").read_text()


def test_a_missing_package_is_a_sentence(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"needs onnxscript, which is not installed; .*'shardline\[export\]'"):
        export_run(_reader(root, "mlp"), tmp_path / "onnx", ExportOptions(format="onnx"))


def test_a_folder_that_is_not_whole_is_a_sentence(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    _exported(root, "bert", folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors, which holds its model; export the run once more"):
        read_deployment(folder)
    text = json.loads((folder / "deployment.json").read_text())
    (folder / "deployment.json").write_text(json.dumps(text | {"version": 2}))
    with pytest.raises(UserError, match=r"deployment\.json cannot be read \(version: "):
        read_deployment(folder)
    for elsewhere in ("../model.safetensors", "/etc/passwd", ".."):
        (folder / "deployment.json").write_text(json.dumps(text | {"file": elsewhere}))
        with pytest.raises(UserError, match=r"deployment\.json cannot be read \(file: "):
            read_deployment(folder)
    (folder / "deployment.json").unlink()
    with pytest.raises(UserError, match=r"has no deployment\.json, so it is no folder that shardline export has"):
        read_deployment(folder)
