"""How rows are divided into splits, and in which order they are visited."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sharding.ranks.errors import UserError
from tests.trainer.data.rows_support import (
    read_split,
    row_config,
    row_samples,
    write_texts,
)
from trainer.config import RunConfig
from trainer.config.data import DataConfig
from trainer.data.documents import documents_in
from trainer.data.loader import BatchLoader, evaluation_batches
from trainer.data.prepare import describe_corpus, prepare_corpus, prepare_rows_by, prepare_samples
from trainer.data.prepared import find_prepared
from trainer.data.prepared_rows import PreparedRows
from trainer.data.row_samples import RowSamples
from trainer.data.samples import FILLER

# How they are divided.


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
    first = row_samples(tmp_path, task, paths=[str(write_texts(tmp_path / "a.jsonl", texts))], **named)
    turned = row_samples(tmp_path, task, paths=[str(write_texts(tmp_path / "b.jsonl", texts[::-1]))], **named)
    splits = _split_of(first, [text for text, _ in texts])
    assert splits == _split_of(turned, [text for text, _ in texts[::-1]])
    assert len(splits) == 80
    assert all(8 <= list(splits.values()).count(split) <= 24 for split in ("validation", "test"))


def test_each_class_has_its_share(tmp_path: Path) -> None:
    texts = [(f"text {i}", "rare" if i % 10 == 0 else "often") for i in range(200)]
    path = str(write_texts(tmp_path / "a.jsonl", texts))
    named = {"source": "jsonl", "paths": [path], "split": {"test_fraction": 0.1, "stratify": True}}
    samples = row_samples(tmp_path, "sequence-classification", **named)
    counts = {s: torch.bincount(read_split(samples, s)["labels"]).tolist() for s in ("train", "validation", "test")}
    assert counts == {"train": [126, 14], "validation": [36, 4], "test": [18, 2]}


def test_a_group_stays_on_one_side(tmp_path: Path) -> None:
    texts = [(f"text {i}", str(i % 2)) for i in range(120)]
    patients = [f"patient {i // 4}" for i in range(120)]
    path = str(write_texts(tmp_path / "a.jsonl", texts, patient=patients))
    named = {"source": "jsonl", "paths": [path], "split": {"group": "patient", "test_fraction": 0.2}}
    splits = _split_of(row_samples(tmp_path, "sequence-classification", **named), [text for text, _ in texts])
    of_patient: dict[str, set[str]] = {}
    for number, (text, _) in enumerate(texts):
        of_patient.setdefault(patients[number], set()).add(splits[text])
    assert all(len(sides) == 1 for sides in of_patient.values())
    assert {next(iter(sides)) for sides in of_patient.values()} == {"train", "validation", "test"}


def test_what_another_split_has_as_well_is_dropped_and_counted(tmp_path: Path) -> None:
    training = write_texts(tmp_path / "a.jsonl", [(f"text {i}", str(i % 2)) for i in range(20)])
    held_out = write_texts(tmp_path / "b.jsonl", [(f"text {i}", str(i % 2)) for i in range(15, 30)])
    test = write_texts(tmp_path / "c.jsonl", [(f"text {i}", str(i % 2)) for i in range(27, 40)])
    paths = {"paths": [str(training)], "validation_paths": [str(held_out)], "test_paths": [str(test)]}
    config = row_config(tmp_path, "sequence-classification", source="jsonl", **paths)
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


def test_a_further_set_has_no_row_that_is_trained_on(tmp_path: Path) -> None:
    texts = [(f"text {i}", str(i % 2)) for i in range(30)]
    path = str(write_texts(tmp_path / "a.jsonl", texts))
    config = row_config(tmp_path, "sequence-classification", source="jsonl", paths=[path], validation_fraction=0.0)
    prepared = prepare_samples(config, progress=False)
    assert isinstance(prepared, PreparedRows)
    # Another label does not make it another text.
    others = write_texts(tmp_path / "b.jsonl", [("text 3", "0"), ("new", "1"), ("text 4", "0"), ("newer", "0")])
    other = config.model_copy(update={"paths": (str(others),)})
    found = prepare_rows_by(prepared.recipe, other, prepared.tokenizer_dir, trained=prepared, progress=False)
    assert (found.manifest.splits["test"].num_rows, found.manifest.splits["test"].num_leaked) == (2, 2)
    assert RowSamples(found).source_ids("test", [0, 1]) == [f"{others}#1", f"{others}#3"]
    alone = prepare_rows_by(prepared.recipe, other, prepared.tokenizer_dir, progress=False)
    assert alone.manifest.splits["test"].num_rows == 4
    same = config.model_copy(update={"max_documents": 5})
    with pytest.raises(
        UserError, match=r"there is no row \(5 rows read, 5 of which are among those that are trained on"
    ):
        prepare_rows_by(prepared.recipe, same, prepared.tokenizer_dir, trained=prepared, progress=False)


# How they are visited.


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, PreparedRows]:
    root = tmp_path_factory.mktemp("texts")
    path = write_texts(root / "a.jsonl", [("word " * (i % 17) + str(i), str(i % 2)) for i in range(100)])
    config = row_config(root, "sequence-classification", source="jsonl", paths=[str(path)])
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


def test_prepared_again_elsewhere_it_is_the_same(texts: tuple[DataConfig, PreparedRows], tmp_path: Path) -> None:
    config, prepared = texts
    again = prepare_samples(config.model_copy(update={"cache_dir": str(tmp_path)}), progress=False)
    assert again.folder != prepared.folder
    assert again.fingerprint == prepared.fingerprint
    # Where the file lies does not count, but a label does.
    lines = Path(config.paths[0]).read_text()
    for name, text, is_same in (("a", lines, True), ("b", lines.replace('"label": "1"', '"label": "2"'), False)):
        (tmp_path / f"{name}.jsonl").write_text(text)
        moved = {"cache_dir": str(tmp_path), "paths": (str(tmp_path / f"{name}.jsonl"),)}
        other = prepare_samples(config.model_copy(update=moved), progress=False)
        assert (other.fingerprint == prepared.fingerprint) == is_same


def test_the_rows_of_positions_are_named(texts: tuple[DataConfig, PreparedRows]) -> None:
    config, prepared = texts
    run = RunConfig.model_validate(
        {"steps": 1, "seed": 7, "model": {"architecture": "bert"}, "data": config.model_dump()}
    )
    named = documents_in(run, prepared, [(0, 3), (70, 72)])
    indices = prepared.order(7, config).indices(np.array([0, 1, 2, 70, 71])).tolist()
    places = RowSamples(prepared).source_ids("train", indices)
    assert named == [{"document": index, "id": place} for index, place in zip(indices, places, strict=True)]


@pytest.mark.parametrize("place", ["batch", "footer"])
def test_changed_bytes_are_found_where_they_are_read(tmp_path: Path, place: str) -> None:
    path = write_texts(tmp_path / "a.jsonl", [(f"text {i}", str(i % 2)) for i in range(50)])
    config = row_config(tmp_path, "sequence-classification", source="jsonl", paths=[str(path)])
    prepared = prepare_samples(config, progress=False)
    assert isinstance(prepared, PreparedRows)
    facts = prepared.manifest.splits["train"]
    file = prepared.folder / "train.arrow"
    contents = bytearray(file.read_bytes())
    contents[facts.batch_offsets[-1] // 2 if place == "batch" else facts.batch_offsets[-1] + 9] ^= 1
    file.write_bytes(contents)
    with pytest.raises(UserError, match=r"prepared rows .* are corrupt: bytes 0 to \d+ of train.arrow have changed"):
        RowSamples(prepared).read("train", [0])


def test_what_reads_packed_tokens_refuses_rows(texts: tuple[DataConfig, PreparedRows]) -> None:
    with pytest.raises(UserError, match=r"data.format=rows: this reads packed tokens"):
        prepare_corpus(texts[0])
