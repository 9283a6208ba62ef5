"""Rows of requests become what training has read of the same rows, bit for bit."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from transformers import BertTokenizerFast

from tests.trainer.data.rows_support import ratings, read_split, row_samples, write_csv
from trainer.data.prepared_rows import PreparedRows
from trainer.data.row_samples import RowSamples
from trainer.data.rows_manifest import RowRecipe
from trainer.data.tokenizer import load_tokenizer, special_tokens, stored_encoder, text_encoder
from trainer.serving.options import RequestFault
from trainer.serving.reading import recipe_reader
from trainer.serving.row_forms import row_form


def recipe_of(samples: RowSamples) -> tuple[RowRecipe, Path]:
    prepared = samples._prepared
    assert isinstance(prepared, PreparedRows)
    return prepared.recipe, prepared.tokenizer_dir or prepared.folder


def served(samples: RowSamples, rows: list[Any], **recipe_fields: Any) -> dict[str, np.ndarray]:
    """What a server makes of rows."""
    recipe, folder = recipe_of(samples)
    recipe = recipe.model_copy(update=recipe_fields)
    asked = TypeAdapter(list[row_form(recipe)]).validate_json(json.dumps(rows))  # type: ignore[misc]
    reader = recipe_reader(recipe, folder)
    return reader.arrays(reader.store(asked))


def assert_equal(samples: RowSamples, split: str, found: dict[str, np.ndarray]) -> None:
    trained = read_split(samples, split)
    names = trained.keys() - {"labels", "num_tokens"}
    assert names
    for name in names:
        assert found[name].dtype == trained[name].numpy().dtype
        assert np.array_equal(found[name], trained[name].numpy()), name
    if "num_tokens" in trained:
        assert found["attention_mask"].sum(axis=1).tolist() == trained["num_tokens"].tolist()


def places(samples: RowSamples, split: str) -> list[int]:
    names = samples.source_ids(split, range(samples.num_samples(split)))
    return [int(name.rpartition("#")[2]) for name in names]


def test_lines_of_a_table(tmp_path: Path) -> None:
    columns = ratings()
    columns["age"][3], columns["city"][4] = "", "Bonn"
    path = write_csv(tmp_path / "a.csv", columns)
    samples = row_samples(tmp_path, "regression", source="table", paths=[str(path)], missing="mean")
    for split in ("train", "validation"):
        rows = [
            {
                "age": float(columns["age"][place]) if columns["age"][place] else None,
                # The same as a text, which forms of a browser send.
                "constant": columns["constant"][place],
                "city": columns["city"][place],
            }
            for place in places(samples, split)
        ]
        assert_equal(samples, split, served(samples, rows, missing="mean"))


def test_users_and_items_that_training_has_not_seen(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", {"user": ["3", "10"] * 4, "item": list("abcdabcd"), "label": [1, 2] * 4})
    named: dict[str, Any] = {"source": "table", "paths": [str(path)], "categories": ["user", "item"]}
    named["validation_fraction"] = 0.0
    samples = row_samples(tmp_path, "regression", **named)
    found = served(samples, [{"user": 10, "item": "d"}, {"user": "10", "item": "zz"}, {"user": 3.0, "item": None}])
    assert found["categories"].tolist() == [[2, 4], [2, 0], [1, 0]]
    assert "features" not in found


@pytest.mark.parametrize("normalize", ["NFC", "NFKC", "none"])
def test_texts(tmp_path: Path, normalize: str) -> None:
    texts = ["\ufb01re and caf\u00e9", "cafe\u0301 <|endoftext|> x", "line\r\nend", "a " * 40, "\U0001f600"] * 4
    rows = [{"text": f"{text} {i}", "label": "ab"[i % 2]} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {"source": "jsonl", "paths": [str(tmp_path / "a.jsonl")], "normalize": normalize, "sequence_length": 24}
    samples = row_samples(tmp_path, "sequence-classification", **named)
    for split in ("train", "validation"):
        asked = [{"text": rows[place]["text"]} for place in places(samples, split)]
        assert_equal(samples, split, served(samples, asked, normalize=normalize))
    with pytest.raises(RequestFault, match="row 0: the text is empty"):
        served(samples, [{"text": " \n"}])


def test_words_and_where_they_begin(tmp_path: Path) -> None:
    words = [["Ada", "lives", "in", "Antananarivo", "now"], ["Rome", "is", "old"]] * 8
    rows = [{"words": [*w, str(i)], "tags": ["O", *"P" * len(w)]} for i, w in enumerate(words)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {"source": "jsonl", "paths": [str(tmp_path / "x.jsonl")], "text_field": "words", "label": "tags"}
    samples = row_samples(tmp_path, "token-classification", vocab_size=270, **named)
    trained = read_split(samples, "train")
    asked = [rows[place] for place in places(samples, "train")]
    assert_equal(samples, "train", served(samples, [{"words": row["words"]} for row in asked]))
    recipe, folder = recipe_of(samples)
    reader = recipe_reader(recipe, folder)
    form = TypeAdapter(list[row_form(recipe)])  # type: ignore[misc]
    stored = reader.store(form.validate_python([{"words": row["words"]} for row in asked]))
    for row, labels, one in zip(asked, trained["labels"], stored, strict=True):
        assert [recipe.classes[labels[start]] for start in one["word_starts"]] == row["tags"]


def test_pixels_and_files_of_images(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    for number in range(12):
        folder = tmp_path / "images" / ("dark" if number % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (10 + number, 12, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{('png', 'jpg', 'bmp')[number % 3]}")
    named = {"source": "images", "paths": [str(tmp_path / "images")], "image_size": 8}
    samples = row_samples(tmp_path, "image-classification", **named)
    files = samples.source_ids("train", range(samples.num_samples("train")))
    rows = [{"image": base64.b64encode(Path(name).read_bytes()).decode()} for name in files]
    rows[0]["image"] = f"data:image/png;base64,{rows[0]['image']}"
    assert_equal(samples, "train", served(samples, rows))
    for wrong, reason in (
        ({"image": "AAAA"}, "cannot be read as an image"),
        ({"image": "!"}, "base64"),
        ({}, "one of both"),
    ):
        with pytest.raises(RequestFault, match=reason):
            served(samples, [wrong])


def test_pixels_of_digits(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    samples = row_samples(tmp_path, "image-classification", source="digits")
    chosen = places(samples, "validation")
    rows = [{"pixels": digits["data"][place].tolist()} for place in chosen]
    assert_equal(samples, "validation", served(samples, rows))
    shaped = [{"pixels": digits["images"][place].tolist()} for place in chosen[:2]]
    shaped.append({"pixels": [digits["images"][chosen[2]].tolist()]})
    assert np.array_equal(served(samples, shaped)["pixel_values"], served(samples, rows[:3])["pixel_values"])
    for pixels in (
        [0] * 63,
        [17] * 64,
        [0.5] * 64,
        [-1] * 64,
        "0" * 64,
        [[0] * 8] * 7 + [[0]],
        [None] * 64,
        [1e400] * 64,
    ):
        with pytest.raises(ValidationError, match="64 whole numbers from 0 to 16"):
            served(samples, [{"pixels": pixels}])


def test_samples_and_files_of_recordings(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / "sounds" / ("low" if number % 2 else "high")
        folder.mkdir(parents=True, exist_ok=True)
        times = np.arange(400 + 10 * number) / 8000
        sound = 0.5 * np.sin(2 * np.pi * (200 if number % 2 else 900) * times + number)
        both = np.stack([sound, 0.5 * sound], axis=1)
        soundfile.write(folder / f"{number}.{'wav' if number % 3 else 'flac'}", both if number % 4 else sound, 8000)
    named = {"source": "audio", "paths": [str(tmp_path / "sounds")], "audio_samples": 450}
    samples = row_samples(tmp_path, "audio-classification", **named)
    files = samples.source_ids("train", range(samples.num_samples("train")))
    rows = [{"audio": base64.b64encode(Path(name).read_bytes()).decode()} for name in files]
    assert_equal(samples, "train", served(samples, rows))
    # Of a long one, what is not computed with is not in memory.
    recipe, folder = recipe_of(samples)
    reader = recipe_reader(recipe, folder)
    stored = reader.store(TypeAdapter(list[row_form(recipe)]).validate_python(rows))  # type: ignore[misc]
    wholes = [row["sound"] if row["sound"].base is None else row["sound"].base for row in stored]
    assert max(map(len, wholes)) == 450
    sound, rate = soundfile.read(io.BytesIO(Path(files[0]).read_bytes()), dtype="float32", always_2d=True)
    mono = sound.mean(axis=1, dtype=np.float32)
    row = {"samples": mono.astype(float).tolist(), "sampling_rate": rate}
    assert np.array_equal(served(samples, [row])["input_values"], served(samples, rows[:1])["input_values"])
    for wrong, reason in (
        ({"samples": [0.0]}, "has no sampling_rate, and the model has learnt 8000"),
        ({"samples": [0.0], "sampling_rate": 44100}, "has 44100 samples a second"),
        ({"audio": base64.b64encode(b"RIFFnothing").decode()}, "cannot be read as a recording"),
    ):
        with pytest.raises(RequestFault, match=reason):
            served(samples, [wrong])


def test_a_stored_tokenizer_encodes_as_transformers_has_it(tmp_path: Path) -> None:
    """Without transformers: the same ids, and a control token's name is text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ada", "ro", "##me", "[", "]", "mask", "sep"]
    BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(tmp_path / "words")
    rows = [{"text": f"def f{i}(): return [MASK] <|endoftext|>", "label": "ab"[i % 2]} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = row_samples(tmp_path, "sequence-classification", source="jsonl", paths=[str(tmp_path / "a.jsonl")])
    for folder in (tmp_path / "words", recipe_of(samples)[1]):
        whole = load_tokenizer(str(folder), packs=False)
        mine, plain, controls = stored_encoder(folder)
        theirs = text_encoder(whole)
        assert set(controls.values()) <= special_tokens(whole)
        for text in ("Ada [MASK] Rome [SEP]", "def f3(): return <|endoftext|>", "[CLS]", "", "\u00e9\U0001f600"):
            for add in (True, False):
                assert mine.encode(text, add_special_tokens=add).ids == theirs.encode(text, add_special_tokens=add).ids
        assert plain.decode([5, 6, 7]) == whole.backend_tokenizer.decode([5, 6, 7])
