"""``shardline quantize``: what it writes is loaded by others, is as good as it says, or is not there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharding.ranks.errors import EXIT_BAD_INPUT, EXIT_FINISHED, UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess
from tests.support import TINY_MODEL, command_environment, run_on_ranks, tiny_values, write_corpus
from tests.trainer.evaluation.exported_runs import write_texts
from tests.trainer.evaluation.in_process import found
from trainer.checkpoint.reader import open_checkpoint
from trainer.commands.export import main as export_main
from trainer.commands.generate import main as generate_main
from trainer.commands.quantize import main
from trainer.config import parse_config
from trainer.config.sections import ModelConfig
from trainer.data.prepared_rows import recipe_facts
from trainer.data.rows_manifest import RowRecipe
from trainer.deploy.compare import compare_folders, open_folder
from trainer.deploy.export import ExportOptions, export_run
from trainer.deploy.quantization_result import quantized_values
from trainer.deploy.quantize import quantize_folder
from trainer.deploy.quantized_folder import load_folder
from trainer.deploy.signature import read_deployment, write_deployment
from trainer.deploy.verify_export import Comparison, refuse_loss
from trainer.evaluation.reference import reference_of
from trainer.evaluation.subject import Asked, find_subject
from trainer.model.models import build_model_on_meta
from trainer.model.pretrained import PretrainedWeights
from trainer.tasks.registry import build_task
from trainer.tasks.task import Metric

_BERT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
_BERT |= {"max_position_embeddings": 32}
_LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}


def _values(root: Path, name: str, task: str, **sections: Any) -> dict[str, Any]:
    return {
        "name": name,
        "steps": 100,
        "output_dir": str(root / "runs"),
        "task": {"name": task},
        "batch": {"global_size": 32, "micro_size": 32},
        "optimizer": {"lr": 0.01},
        "evaluation": {"monitor": "accuracy"},
        "tracking": {"wandb": {"mode": "disabled"}},
    } | sections


def _train_and_export(ranks: Ranks, root: Path, names: tuple[str, ...]) -> None:
    """Runs of ``digits``, ``words`` and ``text``, and their exports."""
    rows = {"cache_dir": str(root / "cache"), "validation_fraction": 0.2}
    words = {"source": "jsonl", "paths": [str(write_texts(root / "words.jsonl", 200, seed=1))], "sequence_length": 16}
    write_texts(root / "others.jsonl", 100, seed=2)
    text = tiny_values(root / "runs", root / "cache", write_corpus(root / "corpus"))
    text |= {"name": "text", "model": TINY_MODEL | {"config": TINY_MODEL["config"] | _LLAMA}, "steps": 2}
    runs = {
        "digits": _values(
            root,
            "digits",
            "image-classification",
            model={"builtin": "mlp", "arguments": {"hidden_sizes": [64]}},
            data={"source": "digits"} | rows,
            steps=200,
        ),
        "words": _values(
            root,
            "words",
            "sequence-classification",
            model={"architecture": "bert", "config": _BERT},
            optimizer={"lr": 0.003},
            data=words | rows,
        ),
        "text": text | {"parallel": {"strategy": "none"}, "schedule": {}},
    }
    for name in names:
        folder = RunsInProcess(ranks, root, root).train_as(parse_config(runs[name], name))
        options = ExportOptions(format="onnx" if name == "digits" else "hf")
        export_run(open_checkpoint(str(folder.path), None), root / f"{name}-export", options)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs ``digits`` and ``words``, and exports of them."""
    folder = tmp_path_factory.mktemp("quantize")
    run_on_ranks(_train_and_export, 1, folder, ("digits", "words"))
    return folder


def _quantize(capsys: pytest.CaptureFixture[str], folder: Path, to: Path, *arguments: object) -> dict[str, Any]:
    assert main([str(folder), "--to", str(to), "--json", *map(str, arguments)]) == EXIT_FINISHED
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.fixture(scope="module")
def words(root: Path) -> tuple[Path, dict[str, Any]]:
    """The classifier of texts in 8 bits, and what the command says of it."""
    asked = Asked(str(root / "words-export"), files=(str(root / "others.jsonl"),))
    reference = reference_of(asked, find_subject(asked, 1, root / "work"))
    done = quantize_folder(root / "words-export", root / "words-int8", "int8-weight", reference)
    return root / "words-int8", quantized_values(done)


_LOAD = """
import sys, torch
from transformers import AutoModelForSequenceClassification
model, report = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(report.values()), report
print(sorted({type(parameter.data).__name__ for parameter in model.parameters()} | {type(model).__name__}))
with torch.no_grad():
    print(model.eval()(torch.arange(1, 9)[None]).logits.double().tolist())
"""


def test_a_quantized_folder_of_transformers_loads_in_a_fresh_process(
    root: Path, words: tuple[Path, dict[str, Any]]
) -> None:
    folder, done = words
    assert done["format"] == "hf"
    assert done["samples"] == 100
    assert done["metrics"]["accuracy"]["before"] > 0.9
    assert done["size_bytes"]["after"] < 0.6 * done["size_bytes"]["before"]
    assert [speed["batch_size"] for speed in done["speed"]] == [1, 32]
    assert all(speed["ratio"]["low"] <= speed["ratio"]["value"] <= speed["ratio"]["high"] for speed in done["speed"])
    assert 0 < done["max_abs_error"] < 0.2
    # What it says is what whoever evaluates it finds.
    again = found(folder, files=(str(root / "others.jsonl"),))
    for name in ("accuracy", "loss"):
        assert again["metrics"][name] == pytest.approx(done["metrics"][name]["after"], rel=1e-6), name
    deployment = read_deployment(folder)
    assert deployment.quantization == "int8-weight"
    assert deployment.quality is not None
    assert deployment.quality.split == "other"
    assert "## Quantisation" in (folder / "README.md").read_text()
    assert {path.suffix for path in (folder).iterdir()} <= {".json", ".md", ".safetensors"}
    fresh = subprocess.run(
        [sys.executable, "-c", _LOAD, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env=command_environment(),
        check=True,
    )
    kinds, logits = fresh.stdout.splitlines()
    assert kinds == "['BertForSequenceClassification', 'Int8Tensor', 'Tensor']"
    with torch.no_grad():
        here = load_folder(folder)(torch.arange(1, 9)[None]).logits
    assert here.double().tolist() == json.loads(logits)


@pytest.mark.slow
def test_a_quantized_language_model_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_on_ranks(_train_and_export, 1, tmp_path, ("text",))
    run = ["--run", tmp_path / "runs/text"]
    done = _quantize(capsys, tmp_path / "text-export", tmp_path / "int8", "--method", "int8-dynamic", *run)
    assert done["metric"] == "loss"
    arguments = [str(tmp_path / "int8"), "--prompt", "def ", "--max-new-tokens", "8", "--temperature", "0"]
    assert generate_main(arguments) == EXIT_FINISHED
    assert capsys.readouterr().out.startswith("def ")
    assert generate_main([*arguments, "--dtype", "bf16"]) == EXIT_BAD_INPUT
    assert "is quantized, and its weights have the format that they lie in" in capsys.readouterr().err
    # Its tied output projection is no matrix of its own.
    assert 0.2 < done["quantized_share"] < 1


@pytest.mark.parametrize("method", ["int8-weight", "int8-dynamic", "int4-weight"])
def test_a_graph(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    import onnxruntime

    done = _quantize(
        capsys, root / "digits-export", tmp_path / "graph", "--method", method, "--run", root / "runs/digits"
    )
    assert done["quantized_share"] == 1
    bound = 0.45 if method == "int4-weight" else 0.6
    assert done["size_bytes"]["after"] < bound * done["size_bytes"]["before"]
    assert done["metrics"]["accuracy"]["before"] > 0.9
    assert done["metrics"]["accuracy"]["after"] >= done["metrics"]["accuracy"]["before"] - 0.005
    deployment = read_deployment(tmp_path / "graph")
    assert (deployment.format, deployment.quantization) == ("onnx", method)
    session = onnxruntime.InferenceSession(tmp_path / "graph" / "model.onnx")
    assert [one.name for one in session.get_inputs()] == [spec.name for spec in deployment.inputs]
    for batch in (1, 7):
        inputs = {spec.name: torch.ones(batch, *map(int, spec.shape[1:])).numpy() for spec in deployment.inputs}
        assert session.run(None, inputs)[0].shape == (batch, 10)
    assert (tmp_path / "graph" / "rows.json").read_text() == (root / "digits-export" / "rows.json").read_text()


def test_an_export_is_quantized_in_one_go(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "graph"
    arguments = [str(root / "runs/digits"), "--to", str(to), "--format", "onnx", "--quantize", "int8-weight"]
    assert export_main(arguments) == EXIT_FINISHED
    assert f"by int8-weight to {to}" in capsys.readouterr().out
    apart = tmp_path / "apart"
    _quantize(capsys, root / "digits-export", apart, "--method", "int8-weight", "--run", root / "runs/digits")
    assert (to / "model.onnx").read_bytes() == (apart / "model.onnx").read_bytes()
    assert sorted(path.name for path in to.iterdir()) == sorted(path.name for path in apart.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apart", "graph"]
    assert export_main([*arguments[:-2], "--sparse", "--quantize", "int8-weight"]) == EXIT_BAD_INPUT
    assert "leave one out" in capsys.readouterr().err
    program = [arguments[0], "--to", str(tmp_path / "program"), "--format", "torch-export", *arguments[-2:]]
    assert export_main(program) == EXIT_BAD_INPUT
    assert "--quantize int8-weight --format torch-export: " in capsys.readouterr().err


def _refused(capsys: pytest.CaptureFixture[str], folder: Path, to: Path, *arguments: object) -> str:
    assert main([str(folder), "--to", str(to), *map(str, arguments)]) == EXIT_BAD_INPUT
    assert not to.exists()
    assert list(to.parent.glob(f".{to.name}.*")) == []
    return capsys.readouterr().err


def _with_outliers(folder: Path, copy: Path) -> Path:
    """A graph that computes the same, with two hidden units a thousand times smaller, and what reads them larger."""
    import onnx
    from onnx import numpy_helper

    shutil.copytree(folder, copy)
    graph = onnx.load(copy / "model.onnx")
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    first, second = (node for node in graph.graph.node if node.op_type == "Gemm")
    for name, factor, axis in (
        (first.input[1], 1e-3, 0),
        (first.input[2], 1e-3, 0),
        (second.input[1], 1e3, 1),
    ):
        values = numpy_helper.to_array(tensors[name]).copy()
        # One in each block of 32.
        np.moveaxis(values, axis, 0)[[5, 40]] *= factor
        tensors[name].CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(graph, copy / "model.onnx")
    return copy


def test_what_costs_too_much_is_not_written(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _with_outliers(root / "digits-export", tmp_path / "outliers")
    arguments = ["--method", "int4-weight", "--run", root / "runs/digits"]
    said = _refused(capsys, folder, tmp_path / "graph", *arguments)
    assert "costs too much: accuracy is" in said
    assert "--accept-loss" in said
    done = _quantize(capsys, folder, tmp_path / "graph", *arguments, "--accept-loss")
    assert done["metrics"]["accuracy"]["after"] < done["metrics"]["accuracy"]["before"] - 0.005
    assert (tmp_path / "graph" / "model.onnx").exists()


def test_what_the_export_has_lost_counts_too(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "export"
    shutil.copytree(root / "digits-export", folder)
    arguments = ["--method", "int8-dynamic", "--run", root / "runs/digits"]
    deployment = read_deployment(folder)
    assert deployment.quality is not None

    trained = {"accuracy": deployment.quality.exported["accuracy"] + 0.02}
    quality = deployment.quality.model_copy(update={"trained": deployment.quality.trained | trained})
    write_deployment(deployment.model_copy(update={"quality": quality}), folder)
    said = _refused(capsys, folder, tmp_path / "graph", *arguments)
    assert "at most 0.5 points is allowed, of which the export has lost 2 already; give another format" in said
    # One that was better on some samples leaves no more room on others.
    worse = Comparison(0.1, {"accuracy": Metric(0.9, "higher")}, {"accuracy": Metric(0.894, "higher")})
    found = deployment.quality.model_copy(update={"trained": {"accuracy": 0.8}, "exported": {"accuracy": 0.9}})
    with pytest.raises(UserError, match=r"costs too much: accuracy is 0\.894 in place of 0\.9 .* allowed; give"):
        refuse_loss(worse, found, "fp32", is_quantized=True, earlier=found)
    # Half a percent of what is better when it is lower.
    grown = Comparison(0.1, {"loss": Metric(2.0, "lower")}, {"loss": Metric(2.006, "lower")})
    of_loss = {"metric": "loss", "trained": {"loss": 1.0}, "exported": {"loss": 1.0}}
    refuse_loss(grown, found.model_copy(update=of_loss), "fp32", is_quantized=True)
    earlier = found.model_copy(update=of_loss | {"exported": {"loss": 1.003}})
    with pytest.raises(UserError, match=r"at most 0\.5 % is allowed, of which the export has lost 0\.3 already"):
        refuse_loss(grown, earlier, "fp32", is_quantized=True, earlier=earlier)


def test_a_comparison_draws_nothing_of_its_caller(root: Path) -> None:
    asked = Asked(str(root / "words-export"), files=(str(root / "others.jsonl"),))
    reference = reference_of(asked, find_subject(asked, 1, root / "work"))
    compute = open_folder(root / "words-export", read_deployment(root / "words-export"))
    drawn = torch.get_rng_state()
    comparison = compare_folders(compute, compute, reference)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert comparison.trained == comparison.exported


def test_what_cannot_be_quantized_is_a_sentence(
    root: Path, words: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to, export = tmp_path / "new", root / "words-export"
    run, int8 = ["--run", root / "runs/words"], ["--method", "int8-weight"]
    assert "name the run that has held some out by --run, or files by --data" in _refused(capsys, export, to, *int8)
    said = _refused(capsys, export, to, *run, "--split", "test", "--data", root / "others.jsonl", *int8)
    assert "both what is compared on" in said
    said = _refused(capsys, export, to, "--run", root / "runs/digits", *int8)
    assert "was trained on other data than" in said
    assert "is no folder" in _refused(capsys, tmp_path / "nothing", to, *run, *int8)
    assert main([str(export), "--to", str(export), *map(str, (*run, *int8))]) == EXIT_BAD_INPUT
    assert "is not empty" in capsys.readouterr().err
    said = _refused(capsys, words[0], to, *run, *int8)
    assert "is quantized already, by int8-weight" in said


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have a kernel for it")
def test_a_method_without_a_kernel_is_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--run", root / "runs/words"]
    said = _refused(capsys, root / "words-export", tmp_path / "new", *run, "--method", "int4-weight")
    assert "torchao has no kernel for it that runs here" in said
    assert "export --format onnx" in said


def test_training_does_not_begin_with_quantized_weights(words: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = words
    settings = ModelConfig(pretrained=str(folder))
    facts = recipe_facts(RowRecipe.model_validate_json((folder / "rows.json").read_text()), folder)
    model = build_model_on_meta(build_task("sequence-classification", facts), settings, facts)
    with pytest.raises(UserError, match="is quantized, and its weights cannot be trained as they are"):
        PretrainedWeights(str(folder), model)
