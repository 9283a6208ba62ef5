"""Exported models of rows judge what they are given as their runs do, also where a batch is padded."""

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from sharding.ranks.errors import UserError
from tests.support import run_on_ranks
from tests.trainer.evaluation.exported_runs import END, train_and_export, write_images, write_sounds, write_texts
from tests.trainer.evaluation.in_process import found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``train_and_export``."""
    folder = tmp_path_factory.mktemp("exports")
    run_on_ranks(train_and_export, 1, folder, timeout_s=300)
    return folder


@pytest.fixture(scope="module")
def files(root: Path) -> dict[str, str]:
    """By the name of a run rows that it has not seen."""
    return {
        "texts": str(write_texts(root / "new.jsonl", 13, seed=2)),
        "sounds": str(write_sounds(root / "new-sounds", 21)),
        "images": str(write_images(root / "new-images", 11, seed=2)),
    }


@pytest.mark.parametrize("name", ["texts", "sounds", "images"])
def test_an_export_finds_what_its_run_finds(root: Path, files: dict[str, str], name: str) -> None:
    of_run, of_export = (found(root / where, files=(files[name],)) for where in (f"runs/{name}", f"{name}-export"))
    assert of_export["samples"] == of_run["samples"] > 10
    assert of_export["metrics"] == pytest.approx(of_run["metrics"], rel=1e-6)
    assert of_export["confusion"] == of_run["confusion"]


def test_texts_are_brought_to_the_form_that_the_run_has_learnt(root: Path, files: dict[str, str]) -> None:
    wide = str.maketrans({letter: chr(ord(letter) + 0xFEE0) for letter in "acdfgklmnorst"})
    rows = [json.loads(line) for line in Path(files["texts"]).read_text().splitlines()]
    for row in rows:
        row["text"] = row["text"].translate(wide)
    assert "moss" not in rows[0]["text"]
    file = root / "wide.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = found(root / "texts-export", files=(files["texts"],))
    for where in ("runs/texts", "texts-export"):
        assert found(root / where, files=(str(file),))["metrics"] == pytest.approx(plain["metrics"], rel=1e-6), where


@pytest.mark.parametrize("name", ["images", "sounds"])
def test_files_are_judged_by_checkpoints_under_a_url(root: Path, files: dict[str, str], name: str) -> None:
    url = f"memory:/{root}/{name}"
    fsspec.filesystem("memory").put(f"{root / 'runs' / name / 'checkpoints'}/", url.partition(":/")[2], recursive=True)
    assert found(url, files=(files[name],)) == found(root / "runs" / name, files=(files[name],))
    assert found(f"file://{root}/runs/{name}/checkpoints", files=(files[name],))["step"] == 2


@pytest.mark.parametrize("subject", ["runs/digits", "digits-export"])
def test_pixels_of_files_are_not_those_of_digits(root: Path, tmp_path: Path, subject: str) -> None:
    images = write_images(tmp_path / "images", 4, seed=1)
    with pytest.raises(
        UserError, match=r"--data: the model has learnt .* whose pixels go up to 16, and those of image"
    ):
        found(root / subject, files=(str(images),))


def test_a_padded_batch_is_judged_as_each_of_its_texts_alone(root: Path, files: dict[str, str]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = root / "texts-export"
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert model.config.pad_token_id == tokenizer.eos_token_id
    texts = ["fern", "fern moss", "moss", "cat dog cat moss moss"]

    def logits(**inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(**inputs).logits
        return found

    alone = torch.cat([logits(**tokenizer(text, return_tensors="pt")) for text in texts])
    # Its last word counts, though its token is 0.
    assert abs(alone[0] - alone[1]).max() > 1e-4
    tokenizer.pad_token = END
    padded = logits(**tokenizer(texts, padding=True, return_tensors="pt"))
    assert torch.allclose(padded, alone, atol=1e-6)
    # And so by the run, which pads as well.
    rows = [json.loads(line) for line in Path(files["texts"]).read_text().splitlines()]
    odds = torch.cat([logits(**tokenizer(row["text"], return_tensors="pt"))[0] for row in rows]).double()
    labels = torch.tensor([float(row["label"] == "plant") for row in rows]).double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(odds, labels)
    assert found(root / "runs" / "texts", files=(files["texts"],))["metrics"]["loss"] == pytest.approx(
        float(loss), rel=1e-5
    )


def test_an_export_must_say_how_rows_are_read(root: Path, files: dict[str, str], tmp_path: Path) -> None:
    without = shutil.copytree(root / "texts-export", tmp_path / "export", ignore=shutil.ignore_patterns("rows.json"))
    with pytest.raises(UserError, match=r"has a ForSequenceClassification and no rows.json"):
        found(without, files=(files["texts"],))
    (without / "rows.json").write_text("{")
    with pytest.raises(UserError, match=r"rows.json cannot be read \(.*; export the run once more"):
        found(without, files=(files["texts"],))
