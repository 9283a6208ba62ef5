"""Runs, exported and served, answer for rows as people have them what the trained model says of the same rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from sklearn.datasets import load_digits

from sharding.ranks.process_group import Ranks
from tests.support import run_on_ranks
from tests.trainer.deploy.small_runs import train_small_runs
from tests.trainer.serving.serving_support import serving
from trainer.checkpoint.reader import open_checkpoint
from trainer.data.any_samples import prepared_samples
from trainer.data.generated import generated_ratings, generated_tones
from trainer.data.prepared import open_corpus
from trainer.deploy.allowed_code import AllowedCode
from trainer.deploy.export import ExportOptions, export_run
from trainer.deploy.quantize import quantize_folder
from trainer.deploy.trained_model import check_checkpoint, open_trained
from trainer.evaluation import subject
from trainer.evaluation.reference import reference_of
from trainer.serving.masks import MaskReader
from trainer.serving.served_model import Asked, ServedModel

NAMES = ("mlp", "lstm", "bert", "decoder", "ratings", "sounds", "masked")
NUM_ROWS = 9

# Each is exported, which takes some seconds.
pytestmark = pytest.mark.timeout(600)


def _train(ranks: Ranks, root: Path) -> None:
    torch.manual_seed(0)
    train_small_runs(ranks, root, {name: {} for name in NAMES})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    run_on_ranks(_train, 1, root, timeout_s=300)
    return root


def raw_rows(name: str, root: Path, places: list[int]) -> list[dict[str, Any]]:
    """Rows as their source has them."""
    if name == "mlp":
        return [{"pixels": load_digits()["data"][place].tolist()} for place in places]
    if name == "ratings":
        ratings = list(generated_ratings())
        return [{"user": ratings[place].user, "item": ratings[place].item} for place in places]
    if name == "sounds":
        tones = list(generated_tones())
        return [{"samples": tones[place].sound.tolist(), "sampling_rate": 8000} for place in places]
    lines = (root / "texts.jsonl").read_text().splitlines()
    return [{"text": json.loads(lines[place])["text"]} for place in places]


def opened(root: Path, name: str, tmp_path: Path) -> tuple[Any, ServedModel]:
    """The trained model, and the served one."""
    reader = open_checkpoint(str(root / "runs" / name), None)
    export_run(reader, tmp_path / "exported", ExportOptions(format="onnx", accept_loss=True))
    (tmp_path / "work").mkdir()
    config = check_checkpoint(reader, averaged=False, allowed=AllowedCode())
    served = ServedModel(tmp_path / "exported", 1)
    served.warm_up()
    return open_trained(reader, config, tmp_path / "work", averaged=False), served


def asked_of(served: ServedModel, rows: list[Any]) -> list[Any]:
    form = TypeAdapter(list[served.row_form])  # type: ignore[name-defined]
    requests = [Asked([row], 3) for row in form.validate_json(json.dumps(rows))]
    return [answer[0] for answer in served.answers(requests)]  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "masked"])
def test_it_is_the_trained_models_own_answer(root: Path, name: str, tmp_path: Path) -> None:
    trained, served = opened(root, name, tmp_path)
    data = trained.config.data
    samples: Any = prepared_samples(open_corpus(trained.config, trained.reader.manifest.data_fingerprint), data)
    num_rows = min(NUM_ROWS, samples.num_samples("validation"))
    places = [int(one.rpartition("#")[2]) for one in samples.source_ids("validation", range(num_rows))]
    predictions = asked_of(served, raw_rows(name, root, places))
    batch = trained.task.make_batch(samples.read("validation", range(num_rows)), torch.arange(num_rows), False)
    with torch.no_grad():
        logits = trained.task.forward(trained.materialized(), batch).logits.double()
    if name == "ratings":
        expected = logits[:, 0] * trained.facts.label_scale + trained.facts.label_mean
        assert [one["value"] for one in predictions] == pytest.approx(expected.tolist(), abs=1e-4)
        return
    probabilities = logits.softmax(dim=-1).numpy()
    for prediction, expected_row in zip(predictions, probabilities, strict=True):
        assert list(prediction["probabilities"]) == list(trained.facts.classes)
        assert list(prediction["probabilities"].values()) == pytest.approx(expected_row, abs=1e-5)
        assert prediction["class"] == trained.facts.classes[int(np.argmax(expected_row))]


@pytest.mark.slow
def test_a_masked_model_fills_in_what_it_has_learnt(root: Path, tmp_path: Path) -> None:
    trained, served = opened(root, "masked", tmp_path)
    texts = ["import [MASK]\nfrom os", "[MASK]", "def f([MASK]):\n    return [MASK]"]
    predictions = asked_of(served, [{"text": text} for text in texts])
    reader = MaskReader(tmp_path / "exported", None)
    model: Any = trained.materialized()
    for text, prediction in zip(texts, predictions, strict=True):
        (stored,) = reader.store(TypeAdapter(list[served.row_form]).validate_python([{"text": text}]))  # type: ignore[name-defined]
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(stored["input_ids"])[None]).logits[0].double().numpy()
        expected = reader.prediction(stored, logits, 3)
        assert prediction["text"] == expected["text"]
        for candidates, others in zip(prediction["masks"], expected["masks"], strict=True):
            assert [one["probability"] for one in candidates] == pytest.approx(
                [o["probability"] for o in others], rel=1e-3
            )


@pytest.mark.slow
def test_a_masked_model_is_quantised(root: Path, tmp_path: Path) -> None:
    run = str(root / "runs" / "masked")
    opened(root, "masked", tmp_path)
    asked = subject.Asked(run)
    reference = reference_of(asked, subject.find_subject(asked, 1, tmp_path / "work"))
    done = quantize_folder(tmp_path / "exported", tmp_path / "int8", "int8-weight", reference, accept_loss=True)
    assert done.quality.metric == "loss"
    assert done.quality.split == "validation"
    ServedModel(tmp_path / "int8", 1).warm_up()


@pytest.mark.slow
def test_a_run_is_exported_and_served_by_one_command(root: Path) -> None:
    with serving(root / "runs" / "mlp", start_s=200) as server:
        rows = raw_rows("mlp", root, [0, 1])
        answer = server.ask(*rows)
        assert answer.status_code == 200
        assert [len(one["probabilities"]) for one in answer.json()["predictions"]] == [10, 10]
