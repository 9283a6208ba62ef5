"""Rows of every kind: what is read, how it is divided and normalised, and what is refused."""

import csv
import gzip
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from PIL import Image

from sharding.ranks.errors import UserError
from trainer.config import parse_config
from trainer.config.data import DataConfig
from trainer.data.any_samples import prepared_samples
from trainer.data.loader import BatchLoader, evaluation_batches
from trainer.data.prepare import describe_corpus, prepare_rows_by, prepare_samples
from trainer.data.prepared import find_prepared
from trainer.data.prepared_rows import PreparedRows
from trainer.data.row_samples import RowSamples
from trainer.data.samples import FILLER

Columns = dict[str, list[Any]]


def _config(root: Path, task: str = "classification", **data: Any) -> DataConfig:
    data = {"cache_dir": str(root / "cache"), "validation_fraction": 0.2, "vocab_size": 300, **data}
    if "validation_paths" in data:
        del data["validation_fraction"]
    values = {"steps": 1, "task": {"name": task}, "model": {"architecture": "bert"}, "data": data}
    return parse_config(values, "test", has_rules=True).data


def _samples(root: Path, task: str = "classification", **data: Any) -> RowSamples:
    config = _config(root, task, **data)
    samples = prepared_samples(prepare_samples(config, progress=False), config)
    assert isinstance(samples, RowSamples)
    return samples


def _all(samples: RowSamples, split: str) -> dict[str, torch.Tensor]:
    return samples.read(split, range(samples.num_samples(split)))


def _manifest(root: Path, task: str = "classification", **data: Any) -> Any:
    prepared = prepare_samples(_config(root, task, **data), progress=False)
    assert isinstance(prepared, PreparedRows)
    return prepared.manifest


def _write_csv(path: Path, columns: Columns) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def _ratings(num_rows: int = 60) -> Columns:
    numbers = np.random.default_rng(0).normal(3.0, 2.0, num_rows)
    return {
        "age": [f"{number:.4f}" for number in numbers],
        "city": [("Oslo", "Rome", "Lima")[i % 3] for i in range(num_rows)],
        "constant": ["7"] * num_rows,
        "label": [f"{number * 2 + i % 3:.3f}" for i, number in enumerate(numbers)],
    }


# What rows hold.


def test_a_table_is_normalised_by_its_training_rows(tmp_path: Path) -> None:
    columns = _ratings()
    path = _write_csv(tmp_path / "ratings.csv", columns)
    samples = _samples(tmp_path, "regression", source="table", paths=[str(path)])
    assert samples.facts.num_features == 2
    assert samples.facts.categories == (("city", 4),)
    training, held_out = _all(samples, "train"), _all(samples, "validation")
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
    training = _write_csv(tmp_path / "a.csv", {"user": ["3", "10"] * 4, "item": list("abcdabcd"), "label": [1, 2] * 4})
    others = _write_csv(tmp_path / "b.csv", {"user": ["10", "99"], "item": ["d", "e"], "label": [1, 2]})
    named = {"source": "table", "paths": [str(training)], "validation_paths": [str(others)]}
    samples = _samples(tmp_path, "regression", categories=["user", "item"], **named)
    assert samples.facts.num_features == 0
    assert samples.facts.categories == (("user", 3), ("item", 5))
    # Whole numbers in the order of their size.
    assert _all(samples, "validation")["categories"].tolist() == [[2, 4], [0, 0]]
    assert "features" not in _all(samples, "validation")


@pytest.mark.parametrize(("missing", "num_rows", "num_filled"), [("mean", 8, 1), ("drop", 7, 0)])
def test_missing_numbers(tmp_path: Path, missing: str, num_rows: int, num_filled: int) -> None:
    columns: Columns = {"x": [1, 2, "", 4, 5, 6, 7, 8], "label": list("abababab")}
    settings = {"source": "table", "paths": [str(_write_csv(tmp_path / "x.csv", columns))], "validation_fraction": 0.0}
    manifest = _manifest(tmp_path, missing=missing, standardize=False, **settings)
    assert (manifest.splits["train"].num_rows, manifest.num_filled) == (num_rows, num_filled)
    values = _all(_samples(tmp_path, missing=missing, standardize=False, **settings), "train")["features"][:, 0]
    assert (33 / 7 in values.double().numpy().round(6).tolist() or values.tolist()[2] == pytest.approx(33 / 7)) == (
        missing == "mean"
    )
    with pytest.raises(UserError, match=r"column x of line 4 of .*x.csv has no number; set data.missing"):
        _samples(tmp_path, **settings)


def test_texts_of_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"body": f"text number {i}", "kind": "odd" if i % 2 else "even"} for i in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    _write_csv(tmp_path / "d.csv", {name: [row[name] for row in rows] for name in ("body", "kind")})
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress((tmp_path / "d.csv").read_bytes()))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    found = set()
    for name, source in (
        *(("a.jsonl", "jsonl"), ("b.jsonl.gz", "jsonl"), ("c.jsonl.zst", "jsonl")),
        *(("d.csv", "csv"), ("e.csv.gz", "csv"), ("f.parquet", "parquet")),
    ):
        named = {"source": source, "paths": [str(tmp_path / name)], "text_field": "body", "label": "kind"}
        samples = _samples(tmp_path, "sequence-classification", **named)
        batch = _all(samples, "train")
        found.add((samples.facts.classes, batch["input_ids"].shape, tuple(batch["labels"].tolist())))
        pad = samples.facts.pad_token_id
        for ids, count in zip(batch["input_ids"], batch["num_tokens"].tolist(), strict=True):
            assert bool((ids[count:] == pad).all())
    assert len(found) == 1
    assert next(iter(found))[0] == ("even", "odd")


def test_a_folder_of_texts_is_named_after_their_class(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / "texts" / ("good" if number % 2 else "bad")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_text(f"number {number}")
    samples = _samples(tmp_path, "sequence-classification", source="text", paths=[str(tmp_path / "texts")])
    assert samples.facts.classes == ("bad", "good")
    assert samples.facts.class_counts == tuple(torch.bincount(_all(samples, "train")["labels"]).tolist())


def test_long_texts_are_cut_and_counted(tmp_path: Path) -> None:
    rows = [{"text": "word " * (3 + 20 * (i % 2)) + str(i), "label": str(i % 2)} for i in range(20)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"source": "jsonl", "paths": [str(tmp_path / "x.jsonl")], "sequence_length": 8}
    splits = _manifest(tmp_path, "sequence-classification", **settings).splits
    assert sum(split.num_truncated for split in splits.values()) == 10
    batch = _all(_samples(tmp_path, "sequence-classification", **settings), "train")
    assert batch["input_ids"].shape[1] == 8


def test_a_tag_belongs_to_its_words_first_token(tmp_path: Path) -> None:
    words = [["Ada", "lives", "in", "Antananarivo", "now"], ["Rome", "is", "old"]] * 8
    tags = [["PER", "O", "O", "LOC", "O"], ["LOC", "O", "O"]] * 8
    rows = [{"words": [*w, str(i)], "tags": [*t, "O"]} for i, (w, t) in enumerate(zip(words, tags, strict=True))]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {"source": "jsonl", "paths": [str(tmp_path / "x.jsonl")], "text_field": "words", "label": "tags"}
    samples = _samples(tmp_path, "token-classification", vocab_size=270, **named)
    assert samples.facts.classes == ("LOC", "O", "PER")
    tokenizer_dir = samples.facts.tokenizer_dir
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    batch = _all(samples, "train")
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


def test_images_have_one_shape_and_are_normalised(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    for number in range(20):
        folder = tmp_path / "images" / ("dark" if number % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 120, (10 + number, 12, 3)) + (0 if number % 2 else 130)
        kind = ("png", "jpg", "bmp")[number % 3]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.{kind}")
    samples = _samples(
        tmp_path, "image-classification", source="images", paths=[str(tmp_path / "images")], image_size=8
    )
    assert samples.facts.image_shape == (3, 8, 8)
    assert samples.facts.classes == ("dark", "light")
    pixels = _all(samples, "train")["pixel_values"]
    assert pixels.shape[1:] == (3, 8, 8)
    assert pixels.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert pixels.std(dim=(0, 2, 3), unbiased=False).numpy() == pytest.approx(1.0, abs=1e-5)


def test_recordings_are_filled_up_with_silence(tmp_path: Path) -> None:
    import soundfile

    for number in range(16):
        folder = tmp_path / "sounds" / ("low" if number % 2 else "high")
        folder.mkdir(parents=True, exist_ok=True)
        times = np.arange(400 + 10 * number) / 8000
        sound = 0.5 * np.sin(2 * np.pi * (200 if number % 2 else 900) * times + number)
        soundfile.write(folder / f"{number}.{'wav' if number % 3 else 'flac'}", sound, 8000)
    named = {"source": "audio", "paths": [str(tmp_path / "sounds")], "validation_fraction": 0.0}
    samples = _samples(tmp_path, "audio-classification", **named)
    assert (samples.facts.num_audio_samples, samples.facts.sampling_rate) == (550, 8000)
    batch = _all(samples, "train")["input_values"]
    assert batch.shape == (16, 550)
    assert batch.std(unbiased=False) == pytest.approx(1.0, abs=0.1)
    lengths = {
        400 + 10 * int(Path(n).stem): row for n, row in zip(samples.source_ids("train", range(16)), batch, strict=True)
    }
    assert bool((lengths[400][400:] == 0).all())
    assert bool(lengths[400][:400].abs().max() > 1)
    cut = _samples(tmp_path, "audio-classification", audio_samples=420, **named)
    assert cut.facts.num_audio_samples == 420
    with wave.open(str(tmp_path / "sounds" / "low" / "other.wav"), "wb") as file:
        file.setparams((1, 2, 4000, 0, "NONE", ""))
        file.writeframes(b"\0\0" * 100)
    with pytest.raises(UserError, match=r"other.wav has 4000 samples a second, but the others have 8000"):
        _samples(tmp_path, "audio-classification", **named)


def test_what_scikit_learn_bundles(tmp_path: Path) -> None:
    digits = _samples(tmp_path, "image-classification", source="digits", split={"test_fraction": 0.2, "stratify": True})
    assert digits.facts.image_shape == (1, 8, 8)
    assert len(digits.facts.classes) == 10
    assert [digits.num_samples(split) for split in ("train", "validation", "test")] == [1079, 359, 359]
    assert _all(digits, "train")["pixel_values"].mean().abs() < 1e-5
    iris = _samples(tmp_path, source="table", table="iris")
    assert (iris.facts.num_features, iris.facts.classes) == (4, ("setosa", "versicolor", "virginica"))
    diabetes = _samples(tmp_path, "regression", source="table", table="diabetes")
    assert (diabetes.facts.num_features, diabetes.facts.classes) == (10, ())
    assert diabetes.facts.label_mean == pytest.approx(152, abs=10)


def test_other_rows_are_read_as_those_that_a_model_was_trained_on(tmp_path: Path) -> None:
    columns = _ratings()
    columns["missing"] = [*"123456789", *"0" * 51]
    settings: dict[str, Any] = {"source": "table", "missing": "mean", "validation_fraction": 0.0}
    config = _config(tmp_path, "regression", paths=[str(_write_csv(tmp_path / "a.csv", columns))], **settings)
    prepared = prepare_samples(config, progress=False)
    assert isinstance(prepared, PreparedRows)
    columns["city"][0], columns["missing"][1] = "Bonn", ""
    other = config.model_copy(update={"paths": (str(_write_csv(tmp_path / "b.csv", columns)),)})
    again = prepare_rows_by(prepared.recipe, other, None, progress=False)
    assert again.recipe == prepared.recipe
    assert again.facts() == prepared.facts()
    before, after = _all(RowSamples(prepared), "train"), _all(RowSamples(again), "test")
    assert after["features"][2:].equal(before["features"][2:])
    assert after["labels"].equal(before["labels"])
    assert (after["categories"][0].item(), float(after["features"][1, 2])) == (0, 0.0)
    other = config.model_copy(update={"paths": (str(_write_csv(tmp_path / "c.csv", {"label": [1]})),)})
    with pytest.raises(UserError, match=r"data.features=age is not a column of line 2"):
        prepare_rows_by(prepared.recipe, other, None, progress=False)


def test_other_texts_are_read_by_the_same_tokenizer(tmp_path: Path) -> None:
    path = str(_texts(tmp_path / "a.jsonl", [(f"text {i}", str(i % 2)) for i in range(40)]))
    config = _config(tmp_path, "sequence-classification", source="jsonl", paths=[path])
    prepared = prepare_samples(config, progress=False)
    assert isinstance(prepared, PreparedRows)
    named = {"paths": (str(_texts(tmp_path / "b.jsonl", [("text 3", "1"), ("other words", "0")])),)}
    again = prepare_rows_by(prepared.recipe, config.model_copy(update=named), prepared.tokenizer_dir, progress=False)
    assert again.facts().vocab_size == prepared.vocab_size
    from transformers import AutoTokenizer

    batch = _all(RowSamples(again), "test")
    assert batch["labels"].tolist() == [1, 0]
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    assert tokenizer.decode(batch["input_ids"][1][: batch["num_tokens"][1]]) == "other words"
    unseen = {"paths": (str(_texts(tmp_path / "c.jsonl", [("text 3", "2")])),)}
    with pytest.raises(UserError, match="of the test split is of the class 2, which no training row has"):
        prepare_rows_by(prepared.recipe, config.model_copy(update=unseen), prepared.tokenizer_dir, progress=False)


# How they are divided.


def _texts(path: Path, texts: list[tuple[str, str]], **columns: list[str]) -> Path:
    rows = [{"text": text, "label": label} for text, label in texts]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _split_of(samples: RowSamples, rows: list[str]) -> dict[str, str]:
    """The split of each row by its text, which its place tells."""
    found = {}
    for split in ("train", "validation", "test"):
        for name in samples.source_ids(split, range(samples.num_samples(split))):
            found[rows[int(name.rpartition("#")[2])]] = split
    return found


def test_the_order_of_rows_moves_none_to_another_split(tmp_path: Path) -> None:
    texts = [(f"text {i}", str(i % 2)) for i in range(80)]
    named = {"source": "jsonl", "split": {"test_fraction": 0.2}}
    task = "sequence-classification"
    first = _samples(tmp_path, task, paths=[str(_texts(tmp_path / "a.jsonl", texts))], **named)
    turned = _samples(tmp_path, task, paths=[str(_texts(tmp_path / "b.jsonl", texts[::-1]))], **named)
    splits = _split_of(first, [text for text, _ in texts])
    assert splits == _split_of(turned, [text for text, _ in texts[::-1]])
    assert len(splits) == 80
    assert all(8 <= list(splits.values()).count(split) <= 24 for split in ("validation", "test"))


def test_each_class_has_its_share(tmp_path: Path) -> None:
    texts = [(f"text {i}", "rare" if i % 10 == 0 else "often") for i in range(200)]
    path = str(_texts(tmp_path / "a.jsonl", texts))
    named = {"source": "jsonl", "paths": [path], "split": {"test_fraction": 0.1, "stratify": True}}
    samples = _samples(tmp_path, "sequence-classification", **named)
    counts = {s: torch.bincount(_all(samples, s)["labels"]).tolist() for s in ("train", "validation", "test")}
    assert counts == {"train": [126, 14], "validation": [36, 4], "test": [18, 2]}


def test_a_group_stays_on_one_side(tmp_path: Path) -> None:
    texts = [(f"text {i}", str(i % 2)) for i in range(120)]
    patients = [f"patient {i // 4}" for i in range(120)]
    path = str(_texts(tmp_path / "a.jsonl", texts, patient=patients))
    named = {"source": "jsonl", "paths": [path], "split": {"group": "patient", "test_fraction": 0.2}}
    splits = _split_of(_samples(tmp_path, "sequence-classification", **named), [text for text, _ in texts])
    of_patient: dict[str, set[str]] = {}
    for number, (text, _) in enumerate(texts):
        of_patient.setdefault(patients[number], set()).add(splits[text])
    assert all(len(sides) == 1 for sides in of_patient.values())
    assert {next(iter(sides)) for sides in of_patient.values()} == {"train", "validation", "test"}


def test_what_another_split_has_as_well_is_dropped_and_counted(tmp_path: Path) -> None:
    training = _texts(tmp_path / "a.jsonl", [(f"text {i}", str(i % 2)) for i in range(20)])
    held_out = _texts(tmp_path / "b.jsonl", [(f"text {i}", str(i % 2)) for i in range(15, 30)])
    test = _texts(tmp_path / "c.jsonl", [(f"text {i}", str(i % 2)) for i in range(27, 40)])
    paths = {"paths": [str(training)], "validation_paths": [str(held_out)], "test_paths": [str(test)]}
    config = _config(tmp_path, "sequence-classification", source="jsonl", **paths)
    prepared = prepare_samples(config, progress=False)
    assert isinstance(prepared, PreparedRows)
    splits = prepared.manifest.splits
    # 15 to 19 are in training, 27 to 29 in the test.
    assert {name: (s.num_rows, s.num_leaked) for name, s in splits.items()} == {
        "train": (20, 0),
        "validation": (7, 8),
        "test": (13, 0),
    }
    assert "validation  7 rows, 8 dropped that another split has as well" in describe_corpus(prepared)


# How they are visited.


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, PreparedRows]:
    root = tmp_path_factory.mktemp("texts")
    path = _texts(root / "a.jsonl", [("word " * (i % 17) + str(i), str(i % 2)) for i in range(100)])
    config = _config(root, "sequence-classification", source="jsonl", paths=[str(path)])
    prepared = prepare_samples(config, progress=False)
    assert isinstance(prepared, PreparedRows)
    return config, prepared


def _loaders(
    texts: tuple[DataConfig, PreparedRows], degree: int, *, bucketed: bool, start: int = 0
) -> list[BatchLoader]:
    config, prepared = texts
    samples = RowSamples(prepared)
    layout = {"global_size": 24, "micro_size": 4 if degree < 3 else 2, "dp_degree": degree, "start_sample": start}
    order = prepared.order(7, config)
    lengths = samples.lengths if bucketed else None
    return [
        BatchLoader(samples, order, dp_rank=rank, prefetch_steps=0, lengths=lengths, **layout) for rank in range(degree)
    ]


def _positions(loaders: list[BatchLoader]) -> list[int]:
    return [p for loader in loaders for micro in loader.next_step() for p in micro.positions.tolist()]


@pytest.mark.parametrize("bucketed", [False, True])
def test_a_step_is_the_same_set_on_any_number_of_ranks(texts: tuple[DataConfig, PreparedRows], bucketed: bool) -> None:
    for degree in (1, 2, 3):
        loaders = _loaders(texts, degree, bucketed=bucketed)
        for step in range(5):
            assert sorted(_positions(loaders)) == list(range(24 * step, 24 * step + 24))
        # Continued in the middle, the next step is the same to the row.
        again = _loaders(texts, degree, bucketed=bucketed, start=48)
        fresh = _loaders(texts, degree, bucketed=bucketed)
        _positions(fresh), _positions(fresh)
        for one, other in zip(again, fresh, strict=True):
            for micro, same in zip(one.next_step(), other.next_step(), strict=True):
                assert micro.positions.equal(same.positions)
                assert all(micro.samples[name].equal(same.samples[name]) for name in micro.samples)


def test_rows_of_like_length_are_in_one_micro_batch(texts: tuple[DataConfig, PreparedRows]) -> None:
    def filled_up(bucketed: bool) -> int:
        micros = [micro for loader in _loaders(texts, 2, bucketed=bucketed) for micro in loader.next_step()]
        return sum(int(m.samples["input_ids"].numel() - m.samples["num_tokens"].sum()) for m in micros)

    assert filled_up(bucketed=True) < 0.3 * filled_up(bucketed=False)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_every_held_out_row_is_evaluated_once(texts: tuple[DataConfig, PreparedRows], degree: int) -> None:
    samples = RowSamples(texts[1])
    found = []
    for rank in range(degree):
        batches = evaluation_batches(samples, "validation", micro_size=3, dp_rank=rank, dp_degree=degree)
        found += [p for micro in batches for p in micro.positions.tolist() if p != FILLER]
    assert sorted(found) == list(range(samples.num_samples("validation")))


def test_prepared_once_and_found_again(texts: tuple[DataConfig, PreparedRows]) -> None:
    config, prepared = texts
    found = find_prepared(config.model_copy(update={"shuffle": False, "bucket_by_length": True}))
    assert isinstance(found, PreparedRows)
    assert found.folder == prepared.folder
    assert find_prepared(config.model_copy(update={"sequence_length": 8})) is None


def test_changed_bytes_are_found_where_they_are_read(tmp_path: Path) -> None:
    path = _texts(tmp_path / "a.jsonl", [(f"text {i}", str(i % 2)) for i in range(50)])
    config = _config(tmp_path, "sequence-classification", source="jsonl", paths=[str(path)])
    prepared = prepare_samples(config, progress=False)
    assert isinstance(prepared, PreparedRows)
    file = prepared.folder / "train.arrow"
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)
    with pytest.raises(UserError, match=r"prepared rows .* are corrupt: bytes 0 to \d+ of train.arrow have changed"):
        RowSamples(prepared).read("train", [0])


# What is refused.


def _refused(root: Path, sentence: str, task: str = "sequence-classification", **data: Any) -> None:
    with pytest.raises(UserError, match=sentence) as raised:
        _samples(root, task, **data)
    assert str(raised.value).count("\n") == 0


def test_what_rows_must_have(tmp_path: Path) -> None:
    jsonl = {"source": "jsonl", "paths": [str(_texts(tmp_path / "a.jsonl", [("x", "1"), ("y", "2"), ("z", "1")]))]}
    _refused(
        tmp_path,
        r"data.label=kind is not a column of line 1 of .*, which has text, label; name one",
        label="kind",
        **jsonl,
    )
    _refused(tmp_path, r"data.text_field=body is not a column of line 1", text_field="body", **jsonl)
    _refused(tmp_path, r"data.split.group=who is not a column of line 1", split={"group": "who"}, **jsonl)
    _refused(tmp_path, r"data.label=label: line 1 of .* has 'many', which is no number", "regression", source="jsonl",
             paths=[str(_texts(tmp_path / "b.jsonl", [("x", "many")]))])  # fmt: skip
    _refused(tmp_path, r"data.label=label: line 1 of .* has no label; mend or remove the row", source="jsonl",
             paths=[str(_texts(tmp_path / "c.jsonl", [("x", "")]))])  # fmt: skip
    alike = _texts(tmp_path / "d.jsonl", [(f"x{i}", "1") for i in range(9)])
    _refused(
        tmp_path,
        r"all \d training rows are of the class 1, so there is nothing to learn",
        source="jsonl",
        paths=[str(alike)],
    )
    other = _texts(tmp_path / "e.jsonl", [("x9", "3")])
    _refused(
        tmp_path,
        r"data.label=label: .*e.jsonl#0 of the validation split is of the class 3, which no training row has",
        validation_paths=[str(other)],
        **jsonl,
    )
    same = _texts(tmp_path / "f.jsonl", [("x", "1")])
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
    path = _write_csv(tmp_path / "a.csv", {"x": [*"12345678", "nine"], "label": list("abababaab")})
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
    (tmp_path / "sounds" / "a").mkdir(parents=True)
    (tmp_path / "sounds" / "a" / "x.wav").write_bytes(b"RIFF")
    named = {"source": "audio", "paths": [str(tmp_path / "sounds")]}
    _refused(tmp_path, r"data.paths: .*x.wav cannot be read as a recording", "audio-classification", **named)


@pytest.mark.parametrize(
    ("task", "data", "sentence"),
    [
        ("causal-lm", {"source": "digits"}, "data.source=digits has rows, but task.name=causal-lm reads"),
        ("causal-lm", {"format": "rows"}, "data.format=rows, but task.name=causal-lm reads packed samples"),
        ("classification", {"source": "digits", "streaming": True}, "streaming=true goes with data.format=auto or"),
        ("classification", {"source": "table"}, "reads either data.table, which is None, or data.paths"),
        ("image-classification", {"source": "images", "paths": ["x"]}, "data.source=images needs data.image_size"),
        ("regression", {"source": "digits", "label_kind": "class"}, "regression learns labels of kind number"),
        ("token-classification", {"source": "csv", "paths": ["x"]}, "data.label_kind=tags needs rows that hold lists"),
        ("classification", {"source": "digits", "image_size": 8}, "image_size=8 goes with data.source=images only"),
        ("classification", {"source": "table", "table": "iris", "features": ["label"]}, "label is named twice"),
        ("classification", {"source": "digits", "split": {"test_fraction": 0.9}}, "leaves nothing to train on"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(tmp_path: Path, task: str, data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        _config(tmp_path, task, **data)
