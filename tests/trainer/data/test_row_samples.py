"""Rows of every kind: what is read, how it is normalised, and what is refused."""

import gzip
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import zstandard
from PIL import Image
from transformers import BertTokenizerFast

from sharding.ranks.errors import UserError
from tests.trainer.data.rows_support import (
    Columns,
    manifest_of,
    ratings,
    read_split,
    row_config,
    row_samples,
    write_csv,
    write_texts,
)
from trainer.build import _tokenizer_of
from trainer.config import parse_config
from trainer.data.any_samples import prepared_samples
from trainer.data.prepare import prepare_rows_by, prepare_samples
from trainer.data.prepared_rows import PreparedRows
from trainer.data.row_samples import RowSamples

# What rows hold.


def test_a_table_is_normalised_by_its_training_rows(tmp_path: Path) -> None:
    columns = ratings()
    path = write_csv(tmp_path / "ratings.csv", columns)
    samples = row_samples(tmp_path, "regression", source="table", paths=[str(path)])
    assert samples.facts.num_features == 2
    assert samples.facts.categories == (("city", 4),)
    training, held_out = read_split(samples, "train"), read_split(samples, "validation")
    assert 0 < len(held_out["labels"]) < len(training["labels"])
    assert training["features"][:, 0].mean().abs() < 1e-6
    assert training["features"][:, 0].std(unbiased=False) == pytest.approx(1.0, abs=1e-6)
    assert bool((training["features"][:, 1] == 0).all())
    rows = [int(name.rpartition("#")[2]) for name in samples.source_ids("train", range(len(training["labels"])))]
    ages = np.array([float(columns["age"][row]) for row in rows])
    held_rows = [int(n.rpartition("#")[2]) for n in samples.source_ids("validation", range(len(held_out["labels"])))]
    expected = (np.array([float(columns["age"][row]) for row in held_rows]) - ages.mean()) / ages.std()
    assert held_out["features"][:, 0].numpy() == pytest.approx(expected, abs=1e-5)
    cities = ["Lima", "Oslo", "Rome"]
    assert training["categories"][:, 0].tolist() == [cities.index(columns["city"][row]) + 1 for row in rows]
    assert training["labels"].numpy() == pytest.approx([float(columns["label"][row]) for row in rows], abs=1e-5)
    assert samples.facts.label_mean == pytest.approx(float(training["labels"].double().mean()), rel=1e-6)
    assert {t.dtype for t in (training["features"], training["labels"])} == {torch.float32}
    assert training["categories"].dtype == torch.int64


def test_a_value_that_training_has_not_seen_has_index_0(tmp_path: Path) -> None:
    training = write_csv(tmp_path / "a.csv", {"user": ["3", "10"] * 4, "item": list("abcdabcd"), "label": [1, 2] * 4})
    others = write_csv(tmp_path / "b.csv", {"user": ["10", "99"], "item": ["d", "e"], "label": [1, 2]})
    named = {"source": "table", "paths": [str(training)], "validation_paths": [str(others)]}
    samples = row_samples(tmp_path, "regression", categories=["user", "item"], **named)
    assert samples.facts.num_features == 0
    assert samples.facts.categories == (("user", 3), ("item", 5))
    # Whole numbers in the order of their size.
    assert read_split(samples, "validation")["categories"].tolist() == [[2, 4], [0, 0]]
    assert "features" not in read_split(samples, "validation")


@pytest.mark.parametrize(("missing", "num_rows", "num_filled"), [("mean", 8, 1), ("drop", 7, 0)])
def test_missing_numbers(tmp_path: Path, missing: str, num_rows: int, num_filled: int) -> None:
    columns: Columns = {"x": [1, 2, "", 4, 5, 6, 7, 8], "label": list("abababab")}
    settings = {"source": "table", "paths": [str(write_csv(tmp_path / "x.csv", columns))], "validation_fraction": 0.0}
    manifest = manifest_of(tmp_path, missing=missing, standardize=False, **settings)
    assert (manifest.splits["train"].num_rows, manifest.num_filled) == (num_rows, num_filled)
    samples = row_samples(tmp_path, missing=missing, standardize=False, **settings)
    numbers = read_split(samples, "train")["features"][:, 0].tolist()
    expected = [1, 2, 33 / 7, 4, 5, 6, 7, 8] if missing == "mean" else [1, 2, 4, 5, 6, 7, 8]
    assert numbers == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UserError, match=r"column x of line 4 of .*x.csv has no number; set data.missing"):
        row_samples(tmp_path, **settings)


def test_texts_of_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"body": f"text number {i}", "kind": "odd" if i % 2 else "even"} for i in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    write_csv(tmp_path / "d.csv", {name: [row[name] for row in rows] for name in ("body", "kind")})
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress((tmp_path / "d.csv").read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    found = set()
    for name, source in (
        *(("a.jsonl", "jsonl"), ("b.jsonl.gz", "jsonl"), ("c.jsonl.zst", "jsonl")),
        *(("d.csv", "csv"), ("e.csv.gz", "csv"), ("f.parquet", "parquet")),
    ):
        named = {"source": source, "paths": [str(tmp_path / name)], "text_field": "body", "label": "kind"}
        samples = row_samples(tmp_path, "sequence-classification", **named)
        batch = read_split(samples, "train")
        found.add((samples.facts.classes, batch["input_ids"].shape, tuple(batch["labels"].tolist())))
        pad = samples.facts.pad_token_id
        for ids, count in zip(batch["input_ids"], batch["num_tokens"].tolist(), strict=True):
            assert bool((ids[count:] == pad).all())
    assert len(found) == 1
    assert next(iter(found))[0] == ("even", "odd")


def test_a_name_is_the_same_from_every_kind_of_file(tmp_path: Path) -> None:
    columns: Columns = {"x": [1, 2, 3, 4], "kind": [1, 2, 1, 2], "label": [0, 1, 0, 1]}
    floats = {name: [float(value) for value in values] for name, values in columns.items()}
    pq.write_table(pa.table(floats), tmp_path / "a.parquet")
    settings: dict[str, Any] = {"source": "table", "categories": "kind", "validation_fraction": 0.0}
    batches = []
    for path in (write_csv(tmp_path / "a.csv", columns), tmp_path / "a.parquet"):
        samples = row_samples(tmp_path, paths=[str(path)], **settings)
        assert samples.facts.classes == ("0", "1")
        batches.append(read_split(samples, "train"))
    assert batches[0]["categories"].tolist() == [[1], [2], [1], [2]]
    assert all(batches[0][name].equal(batches[1][name]) for name in batches[0])


def test_a_folder_of_texts_is_named_after_their_class(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / "texts" / ("good" if number % 2 else "bad")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_text(f"number {number}")
    samples = row_samples(tmp_path, "sequence-classification", source="text", paths=[str(tmp_path / "texts")])
    assert samples.facts.classes == ("bad", "good")
    assert samples.facts.class_counts == tuple(torch.bincount(read_split(samples, "train")["labels"]).tolist())


def test_a_data_set_as_the_library_of_the_hub_reads_it(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_texts(tmp_path / "set" / "train.jsonl", [(f"text {i}", "odd" if i % 2 else "even") for i in range(20)])
    samples = row_samples(tmp_path, "sequence-classification", source="hub", hub_name=str(tmp_path / "set"))
    assert samples.facts.classes == ("even", "odd")
    assert samples.num_samples("train") + samples.num_samples("validation") == 20
    assert samples.source_ids("train", [0])[0].startswith(f"{tmp_path / 'set'}#")
    write_texts(tmp_path / "set" / "test.jsonl", [(f"text {i}", "odd" if i % 2 else "even") for i in range(17, 30)])
    named: dict[str, Any] = {
        "source": "hub",
        "hub_name": str(tmp_path / "set"),
        "hub_test_split": "test",
        "validation_fraction": 0.0,
    }
    samples = row_samples(tmp_path, "sequence-classification", **named)
    # Three of the test's rows are in training too.
    assert [samples.num_samples(split) for split in ("train", "validation", "test")] == [20, 0, 10]


def test_labels_of_the_hub_have_the_names_that_it_gives_them(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(20)]
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = "{names: {'0': negative, '1': positive}}"
    features = f"features:\n  - {{name: text, dtype: string}}\n  - {{name: label, dtype: {{class_label: {names}}}}}"
    (tmp_path / "set" / "README.md").write_text(f"---\ndataset_info:\n  {features}\n---\n")
    named: dict[str, Any] = {"source": "hub", "hub_name": str(tmp_path / "set"), "validation_fraction": 0.0}
    samples = row_samples(tmp_path, "sequence-classification", **named)
    assert samples.facts.classes == ("negative", "positive")
    assert read_split(samples, "train")["labels"].tolist() == [0, 1] * 10


def test_passages_of_the_standard_library_know_their_package(tmp_path: Path) -> None:
    named: dict[str, Any] = {"source": "python-stdlib", "split": {"group": "file"}, "max_documents": 600}
    samples = row_samples(tmp_path, "sequence-classification", **named)
    assert len(samples.facts.classes) > 1
    places = {split: samples.source_ids(split, range(samples.num_samples(split))) for split in ("train", "validation")}
    files = {split: {place.rpartition("#")[0] for place in of_split} for split, of_split in places.items()}
    assert files["train"] & files["validation"] == set()
    labels = samples.read("train", range(samples.num_samples("train")))["labels"].tolist()
    assert [samples.facts.classes[i] for i in labels] == [place.partition("/")[0] for place in places["train"]]


def test_long_texts_are_cut_and_counted(tmp_path: Path) -> None:
    rows = [{"text": "word " * (3 + 20 * (i % 2)) + str(i), "label": str(i % 2)} for i in range(20)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"source": "jsonl", "paths": [str(tmp_path / "x.jsonl")], "sequence_length": 8}
    splits = manifest_of(tmp_path, "sequence-classification", **settings).splits
    assert sum(split.num_truncated for split in splits.values()) == 10
    batch = read_split(row_samples(tmp_path, "sequence-classification", **settings), "train")
    assert batch["input_ids"].shape[1] == 8


def test_a_tokenizer_puts_its_own_tokens_around_a_text(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue", "[", "]", "cls"]
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = [("red green", "a"), ("blue " * 9, "b"), ("[CLS] red", "a"), ("green", "b")]
    path = write_texts(tmp_path / "a.jsonl", texts)
    config = row_config(tmp_path, "sequence-classification", source="jsonl", paths=[str(path)], sequence_length=6,
                        tokenizer=str(tmp_path / "tokenizer"), validation_fraction=0.0, vocab_size=8192)  # fmt: skip
    prepared = prepare_samples(config, progress=False)
    archive = _tokenizer_of(prepared)
    # It has no token that ends a document, and needs none.
    assert archive is not None
    assert archive.entry.eos_token_id is None
    samples = prepared_samples(prepared, config)
    batch = read_split(samples, "train")
    assert batch["input_ids"].tolist() == [
        [2, 5, 6, 3, 0, 0],
        [2, 7, 7, 7, 7, 3],
        # A control token's name in a text is text.
        [2, 8, 10, 9, 5, 3],
        [2, 6, 3, 0, 0, 0],
    ]
    assert batch["num_tokens"].tolist() == [4, 6, 6, 3]


def test_a_tag_belongs_to_its_words_first_token(tmp_path: Path) -> None:
    words = [["Ada", "lives", "in", "Antananarivo", "now"], ["Rome", "is", "old"]] * 8
    tags = [["PER", "O", "O", "LOC", "O"], ["LOC", "O", "O"]] * 8
    rows = [{"words": [*w, str(i)], "tags": [*t, "O"]} for i, (w, t) in enumerate(zip(words, tags, strict=True))]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {"source": "jsonl", "paths": [str(tmp_path / "x.jsonl")], "text_field": "words", "label": "tags"}
    samples = row_samples(tmp_path, "token-classification", vocab_size=270, **named)
    assert samples.facts.classes == ("LOC", "O", "PER")
    tokenizer_dir = samples.facts.tokenizer_dir
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    batch = read_split(samples, "train")
    assert batch["labels"].shape == batch["input_ids"].shape
    for ids, labels, count, name in zip(
        batch["input_ids"],
        batch["labels"],
        batch["num_tokens"],
        samples.source_ids("train", range(len(batch["labels"]))),
        strict=True,
    ):
        row = rows[int(name.rpartition("#")[2])]
        assert tokenizer.decode(ids[:count]).split() == row["words"]
        assert [samples.facts.classes[i] for i in labels.tolist() if i != -100] == row["tags"]
        # The rest of a word's tokens, and what only fills up, has no label.
        starts = [i for i, label in enumerate(labels.tolist()) if label != -100]
        pieces = [tokenizer.decode(ids[a:b]).strip() for a, b in zip(starts, [*starts[1:], int(count)], strict=True)]
        assert pieces == row["words"]


def test_tags_with_a_tokenizer_of_words(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ada", "lives", "ro", "##me"]
    BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(tmp_path / "tokenizer")
    rows = [{"text": ["Ada", "lives", "Rome"], "label": ["P", "O", "L"]}, {"text": ["Rome"] * 3, "label": ["L"] * 3}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named: dict[str, Any] = {"source": "jsonl", "paths": [str(tmp_path / "x.jsonl")], "validation_fraction": 0.0}
    named |= {"tokenizer": str(tmp_path / "tokenizer"), "vocab_size": 8192, "sequence_length": 6}
    samples = row_samples(tmp_path, "token-classification", **named)
    assert samples.facts.classes == ("L", "O", "P")
    batch = read_split(samples, "train")
    assert batch["input_ids"].tolist() == [[2, 5, 6, 7, 8, 3], [2, 7, 8, 7, 8, 3]]
    # The third word of the second row was cut off, with its tag.
    assert batch["labels"].tolist() == [[-100, 2, 1, 0, -100, -100], [-100, 0, -100, 0, -100, -100]]


def test_images_have_one_shape_and_are_normalised(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    for number in range(20):
        folder = tmp_path / "images" / ("dark" if number % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 120, (10 + number, 12, 3)) + (0 if number % 2 else 130)
        kind = ("png", "jpg", "bmp")[number % 3]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.{kind}")
    samples = row_samples(
        tmp_path, "image-classification", source="images", paths=[str(tmp_path / "images")], image_size=8
    )
    assert samples.facts.image_shape == (3, 8, 8)
    assert samples.facts.classes == ("dark", "light")
    pixels = read_split(samples, "train")["pixel_values"]
    assert pixels.shape[1:] == (3, 8, 8)
    assert pixels.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert pixels.std(dim=(0, 2, 3), unbiased=False).numpy() == pytest.approx(1.0, abs=1e-5)


def test_recordings_are_filled_up_with_silence(tmp_path: Path) -> None:
    for number in range(16):
        folder = tmp_path / "sounds" / ("low" if number % 2 else "high")
        folder.mkdir(parents=True, exist_ok=True)
        times = np.arange(400 + 10 * number) / 8000
        sound = 0.5 * np.sin(2 * np.pi * (200 if number % 2 else 900) * times + number)
        soundfile.write(folder / f"{number}.{'wav' if number % 3 else 'flac'}", sound, 8000)
    named = {"source": "audio", "paths": [str(tmp_path / "sounds")], "validation_fraction": 0.0}
    samples = row_samples(tmp_path, "audio-classification", **named)
    assert (samples.facts.num_audio_samples, samples.facts.sampling_rate) == (550, 8000)
    batch = read_split(samples, "train")["input_values"]
    assert batch.shape == (16, 550)
    assert batch.std(unbiased=False) == pytest.approx(1.0, abs=0.1)
    lengths = {
        400 + 10 * int(Path(n).stem): row for n, row in zip(samples.source_ids("train", range(16)), batch, strict=True)
    }
    assert bool((lengths[400][400:] == 0).all())
    assert bool(lengths[400][:400].abs().max() > 1)
    cut = row_samples(tmp_path, "audio-classification", audio_samples=420, **named)
    assert cut.facts.num_audio_samples == 420
    with wave.open(str(tmp_path / "sounds" / "low" / "other.wav"), "wb") as file:
        file.setparams((1, 2, 4000, 0, "NONE", ""))
        file.writeframes(b"\0\0" * 100)
    with pytest.raises(UserError, match=r"other.wav has 4000 samples a second, but the others have 8000"):
        row_samples(tmp_path, "audio-classification", **named)


def test_what_scikit_learn_bundles(tmp_path: Path) -> None:
    digits = row_samples(
        tmp_path, "image-classification", source="digits", split={"test_fraction": 0.2, "stratify": True}
    )
    assert digits.facts.image_shape == (1, 8, 8)
    assert len(digits.facts.classes) == 10
    assert [digits.num_samples(split) for split in ("train", "validation", "test")] == [1079, 359, 359]
    assert read_split(digits, "train")["pixel_values"].mean().abs() < 1e-5
    iris = row_samples(tmp_path, source="table", table="iris")
    assert (iris.facts.num_features, iris.facts.classes) == (4, ("setosa", "versicolor", "virginica"))
    diabetes = row_samples(tmp_path, "regression", source="table", table="diabetes")
    assert (diabetes.facts.num_features, diabetes.facts.classes) == (10, ())
    assert diabetes.facts.label_mean == pytest.approx(152, abs=10)


def test_other_rows_are_read_as_those_that_a_model_was_trained_on(tmp_path: Path) -> None:
    columns = ratings()
    columns["missing"] = [*"123456789", *"0" * 51]
    settings: dict[str, Any] = {"source": "table", "missing": "mean", "validation_fraction": 0.0}
    config = row_config(tmp_path, "regression", paths=[str(write_csv(tmp_path / "a.csv", columns))], **settings)
    prepared = prepare_samples(config, progress=False)
    assert isinstance(prepared, PreparedRows)
    columns["city"][0], columns["missing"][1] = "Bonn", ""
    other = config.model_copy(update={"paths": (str(write_csv(tmp_path / "b.csv", columns)),)})
    again = prepare_rows_by(prepared.recipe, other, None, progress=False)
    assert again.recipe == prepared.recipe
    assert again.facts() == prepared.facts()
    before, after = read_split(RowSamples(prepared), "train"), read_split(RowSamples(again), "test")
    assert after["features"][2:].equal(before["features"][2:])
    assert after["labels"].equal(before["labels"])
    assert (after["categories"][0].item(), float(after["features"][1, 2])) == (0, 0.0)
    other = config.model_copy(update={"paths": (str(write_csv(tmp_path / "c.csv", {"label": [1]})),)})
    with pytest.raises(UserError, match=r"data.features=age is not a column of line 2"):
        prepare_rows_by(prepared.recipe, other, None, progress=False)


def test_other_texts_are_read_by_the_same_tokenizer(tmp_path: Path) -> None:
    path = str(write_texts(tmp_path / "a.jsonl", [(f"text {i}", str(i % 2)) for i in range(40)]))
    config = row_config(tmp_path, "sequence-classification", source="jsonl", paths=[path])
    prepared = prepare_samples(config, progress=False)
    assert isinstance(prepared, PreparedRows)
    named = {"paths": (str(write_texts(tmp_path / "b.jsonl", [("text 3", "1"), ("other words", "0")])),)}
    again = prepare_rows_by(prepared.recipe, config.model_copy(update=named), prepared.tokenizer_dir, progress=False)
    assert again.facts().vocab_size == prepared.vocab_size
    from transformers import AutoTokenizer

    batch = read_split(RowSamples(again), "test")
    assert batch["labels"].tolist() == [1, 0]
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    assert tokenizer.decode(batch["input_ids"][1][: batch["num_tokens"][1]]) == "other words"
    unseen = {"paths": (str(write_texts(tmp_path / "c.jsonl", [("text 3", "2")])),)}
    with pytest.raises(UserError, match="of the test split is of the class 2, which no training row has"):
        prepare_rows_by(prepared.recipe, config.model_copy(update=unseen), prepared.tokenizer_dir, progress=False)


# What is refused.


def _refused(root: Path, sentence: str, task: str = "sequence-classification", **data: Any) -> None:
    with pytest.raises(UserError, match=sentence) as raised:
        row_samples(root, task, **data)
    assert str(raised.value).count("\n") == 0


def test_what_rows_must_have(tmp_path: Path) -> None:
    jsonl = {"source": "jsonl", "paths": [str(write_texts(tmp_path / "a.jsonl", [("x", "1"), ("y", "2"), ("z", "1")]))]}
    _refused(
        tmp_path,
        r"data.label=kind is not a column of line 1 of .*, which has text, label; name one",
        label="kind",
        **jsonl,
    )
    _refused(tmp_path, r"data.text_field=body is not a column of line 1", text_field="body", **jsonl)
    _refused(tmp_path, r"data.split.group=who is not a column of line 1", split={"group": "who"}, **jsonl)
    _refused(tmp_path, r"data.label=label: line 1 of .* has 'many', which is no number", "regression", source="jsonl",
             paths=[str(write_texts(tmp_path / "b.jsonl", [("x", "many")]))])  # fmt: skip
    _refused(tmp_path, r"data.label=label: line 1 of .* has no label; mend or remove the row", source="jsonl",
             paths=[str(write_texts(tmp_path / "c.jsonl", [("x", "")]))])  # fmt: skip
    alike = write_texts(tmp_path / "d.jsonl", [(f"x{i}", "1") for i in range(9)])
    _refused(
        tmp_path,
        r"all \d training rows are of the class 1, so there is nothing to learn",
        source="jsonl",
        paths=[str(alike)],
    )
    other = write_texts(tmp_path / "e.jsonl", [("x9", "3")])
    _refused(
        tmp_path,
        r"data.label=label: .*e.jsonl#0 of the validation split is of the class 3, which no training row has",
        validation_paths=[str(other)],
        **jsonl,
    )
    same = write_texts(tmp_path / "f.jsonl", [("x", "1")])
    _refused(
        tmp_path,
        r"data.test_paths: the test split is empty \(4 rows read, 1 of its rows being in another split too\)",
        test_paths=[str(same)],
        **jsonl,
    )
    tags = tmp_path / "g.jsonl"
    tags.write_text(json.dumps({"text": ["a", "b"], "label": ["X"]}) + "\n")
    _refused(
        tmp_path,
        r"line 1 of .* has 1 tags for 2 words; mend the row",
        "token-classification",
        source="jsonl",
        paths=[str(tags)],
    )
    (tmp_path / "empty.jsonl").write_text("")
    _refused(
        tmp_path,
        r"data.paths: the train split is empty \(0 rows read\)",
        source="jsonl",
        paths=[str(tmp_path / "empty.jsonl")],
    )


def test_what_a_table_must_have(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", {"x": [*"12345678", "nine"], "label": list("abababaab")})
    table = {"source": "table", "paths": [str(path)]}
    _refused(tmp_path, r"column x of line 10 of .* is 'nine', which is no number; name the column in data.categories",
             "classification", features=["x"], **table)  # fmt: skip
    _refused(tmp_path, r"data.features=y is not a column of line 2", "classification", features=["y"], **table)
    ragged = tmp_path / "b.csv"
    ragged.write_text("x,label\n1,a\n2\n")
    _refused(
        tmp_path,
        r"line 3 of .*b.csv has 1 values and the header 2; mend",
        "classification",
        source="table",
        paths=[str(ragged)],
    )


def test_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    named = {"source": "images", "paths": [str(tmp_path / "images")], "image_size": 8}
    _refused(
        tmp_path,
        r"data.paths: .*x.png cannot be read as an image \(.*\); mend or remove it",
        "image-classification",
        **named,
    )
    # Brought to 8 bits, all of it would be white.
    Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)).save(tmp_path / "images" / "a" / "x.png")
    _refused(
        tmp_path, r"x.png cannot .* \(its mode is I;16, which has more than 8 bits", "image-classification", **named
    )
    (tmp_path / "sounds" / "a").mkdir(parents=True)
    (tmp_path / "sounds" / "a" / "x.wav").write_bytes(b"RIFF")
    named = {"source": "audio", "paths": [str(tmp_path / "sounds")]}
    _refused(tmp_path, r"data.paths: .*x.wav cannot be read as a recording", "audio-classification", **named)
    soundfile.write(tmp_path / "sounds" / "a" / "x.wav", np.array([0.1, np.nan]), 8000, subtype="FLOAT")
    _refused(tmp_path, r"x.wav has samples that are no finite numbers", "audio-classification", **named)


def test_a_budget_of_tokens_is_for_packed_ones() -> None:
    values = {
        "tokens": 100,
        "task": {"name": "classification"},
        "model": {"builtin": "mlp"},
        "data": {"source": "digits"},
    }
    with pytest.raises(UserError, match=r"tokens=100 counts samples of data.sequence_length tokens, but rows have"):
        parse_config(values, "test")


@pytest.mark.parametrize(
    ("task", "data", "sentence"),
    [
        ("causal-lm", {"source": "digits"}, "data.source=digits has rows, but task.name=causal-lm reads"),
        ("causal-lm", {"format": "rows"}, "data.format=rows, but task.name=causal-lm reads packed samples"),
        ("classification", {"source": "digits", "streaming": True}, "streaming=true goes with data.format=auto or"),
        (
            "classification",
            {"mixture": [{"name": "a", "weight": 1.0, "source": "digits"}]},
            "data.mixture goes with data.format=auto or packed only, but it is rows",
        ),
        ("classification", {"source": "table"}, "reads either data.table, which is None, or data.paths"),
        ("image-classification", {"source": "images", "paths": ["x"]}, "data.source=images needs data.image_size"),
        ("regression", {"source": "digits", "label_kind": "class"}, "regression learns labels of kind number"),
        ("token-classification", {"source": "csv", "paths": ["x"]}, "data.label_kind=tags needs rows that hold lists"),
        ("classification", {"source": "digits", "sequence_length": 8}, "data.sequence_length=8 goes with data.source="),
        ("classification", {"source": "digits", "image_size": 8}, "image_size=8 goes with data.source=images only"),
        ("classification", {"source": "table", "table": "iris", "features": ["label"]}, "label is named twice"),
        ("classification", {"source": "digits", "split": {"test_fraction": 0.9}}, "leaves nothing to train on"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(tmp_path: Path, task: str, data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        row_config(tmp_path, task, **data)
