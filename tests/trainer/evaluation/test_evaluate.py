"""``shardline evaluate`` against scikit-learn on ragged rows over 1, 2 and 3 ranks, and what it refuses."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as referee

from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess
from tests.support import run_module, run_on_ranks, shardline, tiny_values, trained, write_config
from tests.trainer.evaluation.in_process import found
from trainer.checkpoint.reader import open_checkpoint
from trainer.config import parse_config
from trainer.data.any_samples import prepared_samples
from trainer.data.prepared import open_prepared
from trainer.deploy.allowed_code import AllowedCode
from trainer.evaluation.on_ranks import evaluate_here
from trainer.evaluation.subject import Asked, find_subject
from trainer.model.models import build_model_on_meta
from trainer.tasks.registry import configured_task
from trainer.tasks.task import Outputs

_TASKS: dict[str, dict[str, Any]] = {
    "three": {"name": "classification", "class_weights": "balanced", "label_smoothing": 0.1},
    "two": {"name": "classification", "loss": "binary-cross-entropy"},
    "number": {"name": "regression", "loss": "huber"},
}


def _write_table(path: Path, task: str, num_rows: int, seed: int) -> Path:
    draw = random.Random(seed)
    lines = ["a,b,kind,label"]
    for _ in range(num_rows):
        a, b, kind = draw.gauss(5, 2), draw.gauss(0, 1), draw.choice(["x", "y", "z"])
        score = a - 5 + b + (kind == "y") + draw.gauss(0, 1)
        label: Any = {
            "three": "low" if score < -1 else "mid" if score < 1 else "high",
            "two": "no" if score < 0 else "yes",
        }
        lines.append(f"{a},{b},{kind},{label.get(task, 1000 + 10 * score)}")
    path.write_text("\n".join(lines) + "\n")
    return path


def _train(ranks: Ranks, root: Path) -> None:
    for task in _TASKS:
        values = {
            "name": task,
            "steps": 4,
            "output_dir": str(root / "runs"),
            "task": _TASKS[task],
            "model": {"builtin": "embedding-mlp", "arguments": {"hidden_sizes": [5], "embedding_size": 2}},
            "data": {
                "source": "table",
                "paths": [str(_write_table(root / f"{task}.csv", task, 150, seed=1))],
                "validation_fraction": 0.0,
                "split": {"test_fraction": 0.2},
                "cache_dir": str(root / "cache"),
            },
            "batch": {"global_size": 15, "micro_size": 5},
            "optimizer": {"lr": 0.1},
            "tracking": {"wandb": {"mode": "disabled"}},
        }
        RunsInProcess(ranks, root, root).train_as(parse_config(values, task))
        _write_table(root / f"{task}-new.csv", task, 23, seed=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of each task on a table, under ``runs``, and a table of other rows for each."""
    root = tmp_path_factory.mktemp("evaluate")
    run_on_ranks(_train, 1, root)
    return root


def _contents(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path} {path.stat().st_mtime_ns}".encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def _predictions(run: Path, samples: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and labels of a whole split in one plain pass, with the weights of the run's checkpoint."""
    reader = open_checkpoint(str(run), None)
    config = parse_config(reader.manifest.config, "test", has_rules=False)
    task: Any = configured_task(config.task, samples.facts)
    model = build_model_on_meta(task, config.model, samples.facts).to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read_parameter(name))
        number = samples.num_samples(split)
        batch = task.make_batch(samples.read(split, range(number)), torch.arange(number), training=False)
        outputs: Outputs = task.forward(model, batch)
    assert outputs.logits is not None
    labels = samples.read(split, range(number))["labels"]
    return outputs.logits.double().numpy(), labels.numpy()


def _expected(task: str, outputs: np.ndarray, labels: np.ndarray, facts: Any) -> dict[str, float]:
    """What scikit-learn makes of it."""
    if task == "number":
        predictions = outputs[:, 0] * facts.label_scale + facts.label_mean
        truth = labels.astype(np.float64)
        return {
            "mse": referee.mean_squared_error(truth, predictions),
            "mae": referee.mean_absolute_error(truth, predictions),
            "r2": referee.r2_score(truth, predictions),
        }
    if task == "two":
        outputs = np.concatenate([np.zeros_like(outputs), outputs], axis=1)
    probabilities = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    taken = outputs.argmax(axis=1)
    macro = referee.precision_recall_fscore_support(labels, taken, average="macro", zero_division=0)
    by_class = referee.f1_score(labels, taken, average=None, labels=range(outputs.shape[1]), zero_division=0)
    return {
        "loss": referee.log_loss(labels, probabilities),
        "accuracy": referee.accuracy_score(labels, taken),
        **dict(zip(("precision_macro", "recall_macro", "f1_macro"), macro[:3], strict=True)),
        "f1_micro": referee.f1_score(labels, taken, average="micro"),
        "auroc": referee.roc_auc_score(labels, probabilities[:, 1])
        if task == "two"
        else referee.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"),
        **{f"f1/{name}": score for name, score in zip(facts.classes, by_class, strict=True)},
    }


def _evaluate(ranks: Ranks, root: Path, num_ranks: int) -> None:
    for task in _TASKS:
        run = root / "runs" / task
        for files in ((), (str(root / f"{task}-new.csv"),)):
            work = root / f"work-{num_ranks}-{ranks.rank}-{task}-{len(files)}"
            work.mkdir()
            subject = find_subject(Asked(str(run), split="test", files=files), num_ranks, work)
            found = evaluate_here(subject, ranks)
            expected = json.loads((root / f"{task}-{len(files)}.json").read_text())
            assert found["samples"] == expected.pop("samples")
            assert {name: found["metrics"][name] for name in expected} == pytest.approx(expected, abs=1e-6, rel=1e-6)
            assert set(found["metrics"]) - expected.keys() <= {"loss"}


def test_it_equals_scikit_learn_over_one_two_and_three_ranks(runs: Path) -> None:
    before = _contents(runs / "runs")
    for task in _TASKS:
        run = runs / "runs" / task
        for files in ((), (str(runs / f"{task}-new.csv"),)):
            work = runs / f"referee-{task}-{len(files)}"
            work.mkdir()
            subject = find_subject(Asked(str(run), split="test", files=files), 1, work)
            samples = _samples(subject)
            number = samples.num_samples("test")
            # Neither ranks nor micro-batches divide them.
            assert number % 5
            assert number == (23 if files else number)
            expected = _expected(task, *_predictions(run, samples, "test"), samples.facts)
            (runs / f"{task}-{len(files)}.json").write_text(json.dumps({"samples": number} | expected))
    for num_ranks in (1, 2, 3):
        run_on_ranks(_evaluate, num_ranks, runs, num_ranks)
    assert _contents(runs / "runs") == before


def _samples(subject: Any) -> Any:
    prepared = open_prepared(subject.prepared_dir, subject.config.data)
    assert prepared is not None
    return prepared_samples(prepared, subject.config.data)


def test_the_command_prints_numbers_for_programs_and_for_people(runs: Path) -> None:
    run = runs / "runs" / "three"
    found = shardline("evaluate", run, "--split", "test", "--nproc-per-node", 2, "--json")
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    assert (result["step"], result["ranks"], result["data"]) == (4, 2, "the split test")
    assert sum(map(sum, result["confusion"])) == result["samples"]
    assert [row["name"] for row in result["classes"]] == ["high", "low", "mid"]
    shown = shardline("evaluate", run, "--split", "test")
    assert shown.returncode == 0, shown.stderr
    assert f"{result['metrics']['f1_macro']:.6g}" in shown.stdout
    assert f"step 4 of {run} on the split test: {result['samples']} samples" in shown.stdout


def test_what_cannot_be_evaluated_is_refused(runs: Path, tmp_path: Path) -> None:
    run = runs / "runs" / "three"

    def refused(match: str, where: Path = run, **asked: Any) -> None:
        work = tmp_path / f"work-{len(list(tmp_path.iterdir()))}"
        work.mkdir()
        with pytest.raises(UserError, match=match):
            find_subject(Asked(str(where), **asked), 1, work)

    refused("has no samples in such a split; set data.validation_fraction")
    refused("there are train, validation, test, or name files", split="dev")
    refused("step-00000009", step=9)
    refused("nowhere", where=tmp_path / "nowhere")
    refused("has no average of the weights", split="test", averaged=True)
    unknown = _write_lines(tmp_path / "unknown.csv", "a,b,kind,label", "1,2,x,low", "1,2,x,huge")
    refused("huge", files=(str(unknown),))
    bare = _write_lines(tmp_path / "bare.csv", "a,b,kind", "1,2,x")
    refused("data.label=label is not a column of", files=(str(bare),))
    weights = next((run / "checkpoints" / "step-00000004").glob("*.safetensors"))
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    refused("SHA-256", split="test")
    weights.write_bytes(original)
    finished = shardline("evaluate", run, "--split", "test", "--data", bare)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == f"error: --split test and --data {bare} name both what is evaluated on; leave one out.\n"


def _write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_text_of_a_run_and_of_its_export(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    corpus, cache = shared_corpus
    text = tmp_path / "new.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 20 + "# that is all\n")
    values = tiny_values(tmp_path / "runs", cache, corpus) | {"steps": 2}
    values["evaluation"] = {"sets": [{"name": "new", "source": "text", "paths": [str(text)]}]}
    trained(run_module("trainer", write_config(tmp_path / "run.yaml", values), "batch.micro_size=12"))
    run = tmp_path / "runs" / "tiny"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    logged = json.loads(lines[-1])
    held_out = found(run)
    assert held_out["metrics"] == pytest.approx(
        {name: logged[f"eval/{name}"] for name in ("loss", "perplexity", "bits_per_byte")}, rel=1e-6
    )
    of_set = found(run, split="new")
    assert of_set["metrics"]["loss"] == pytest.approx(logged["eval/new/loss"], rel=1e-6)
    given = found(run, files=(str(text),))
    assert given == of_set
    exported = shardline("export", run, "--to", tmp_path / "model")
    assert exported.returncode == 0, exported.stderr
    again = found(tmp_path / "model", files=(str(text),))
    assert (given["step"], again["step"]) == (2, None)
    # Sequences are as long as the model has positions, so that only bytes are the same.
    assert given["metrics"].keys() == again["metrics"].keys()
    assert again["samples"] < given["samples"]
    file = tmp_path / "model" / "deployment.json"
    described = json.loads(file.read_text())
    assert described["normalize"] == "NFC"
    file.write_text(json.dumps(described | {"normalize": "none"}))
    asked = Asked(str(tmp_path / "model"), files=(str(text),))
    assert find_subject(asked, 1, tmp_path).config.data.normalize == "none"
    with pytest.raises(UserError, match="has no split of its own; name files by --data"):
        found(tmp_path / "model")


def _train_stages(ranks: Ranks, root: Path, corpus: Path) -> None:
    # Its class has 1024 positions, which are the longest sequences' where these are longer.
    model = {"architecture": "gpt2", "config": {"n_embd": 8, "n_layer": 1, "n_head": 2}}
    long = {"name": "long", "steps": 1, "data": {"sequence_length": 1040}, "batch": {"global_size": 1}}
    sections = {"model": model, "stages": [{"name": "short", "steps": 1}, long], "schedule": {"name": "constant"}}
    values = tiny_values(root / "runs", root / "cache", corpus) | sections
    values |= {"name": "staged", "steps": None, "batch": {"global_size": 12, "micro_size": 1}}
    values |= {"checkpoint": {"every_steps": 1, "keep_last": 0}, "evaluation": {"every_steps": 1}}
    RunsInProcess(ranks, root, corpus).train_as(parse_config(values, "staged"))


def test_a_checkpoint_of_a_shorter_stage_has_the_positions_of_the_longest(
    tmp_path: Path, shared_corpus: tuple[Path, Path]
) -> None:
    run_on_ranks(_train_stages, 1, tmp_path, shared_corpus[0])
    run = tmp_path / "runs" / "staged"
    logged = [json.loads(line)["eval/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step, loss in enumerate(logged, start=1):
        assert found(run, step=step)["metrics"]["loss"] == pytest.approx(loss, rel=1e-6)


_OWN_MODEL = """
from torch import nn


class Own(nn.Module):
    def __init__(self, num_features, num_outputs):
        super().__init__()
        self.head = nn.Linear(num_features, num_outputs)

    def forward(self, features):
        return self.head(features)


def make(*, facts, num_outputs):
    return Own(facts.num_features, num_outputs)
"""


def test_a_model_of_ones_own_is_made_where_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "own_model.py").write_text(_OWN_MODEL)
    values = {
        "name": "own",
        "steps": 2,
        "output_dir": str(tmp_path / "runs"),
        "task": {"name": "regression"},
        "model": {"factory": "own_model:make"},
        "data": {
            "source": "table",
            "paths": [str(_write_table(tmp_path / "a.csv", "number", 60, seed=1))],
            "features": ["a", "b"],
            "cache_dir": str(tmp_path / "cache"),
            "validation_fraction": 0.2,
        },
        "batch": {"global_size": 8, "micro_size": 8},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    trained(run_module("trainer", write_config(tmp_path / "run.yaml", values)))
    run = tmp_path / "runs" / "own"
    with pytest.raises(UserError, match=r"asks for Python code by model.factory=own_model:make"):
        found(run)
    evaluated = found(run, allowed=AllowedCode(factories=("own_model:make",)))
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert evaluated["metrics"] == pytest.approx(
        {name: logged[f"eval/{name}"] for name in ("loss", "mse", "mae", "r2")}, rel=1e-6
    )
