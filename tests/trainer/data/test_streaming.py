"""Streaming: exactly the same batches after any restart, ranks with parts of their own, nothing that is held out."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, computed_lines
from tests.support import run_on_ranks, tiny_values
from trainer.commands.show_data import main as show
from trainer.config import parse_config
from trainer.config.data import DataConfig
from trainer.data.prepare import prepare_corpus
from trainer.data.prepared import PreparedStream
from trainer.data.samples import MicroBatch
from trainer.data.streaming import DocumentStream, StreamingLoader, state_of_rank
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.listing import list_checkpoints
from trainer.tasks.next_tokens import next_token_batch

LENGTH = 16
NUM_DOCUMENTS = 90


def _text(number: int) -> str:
    # Some documents are longer than several sequences, some are shorter than one, some are empty.
    return "" if number % 17 == 5 else f"document {number} says " + f"word{number} " * (1 + number * 7 % 40)


def _write_source(root: Path, kind: str) -> Path:
    """The same documents in three files of JSON lines or Parquet, or each in a text file of its own."""
    folder = root / kind
    folder.mkdir()
    texts = [_text(number) for number in range(NUM_DOCUMENTS)]
    if kind == "text":
        for number, text in enumerate(texts):
            (folder / f"{number:03d}.txt").write_text(text)
        return folder
    for part, chosen in enumerate((texts[:20], texts[20:55], texts[55:])):
        if kind == "jsonl":
            (folder / f"{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
        else:
            pq.write_table(pa.table({"text": chosen}), folder / f"{part}.parquet", row_group_size=8)
    return folder


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[DataConfig, PreparedStream]]:
    """A streamed source of each kind, and what is prepared of its beginning."""
    root = tmp_path_factory.mktemp("streams")
    found = {}
    for kind in ("jsonl", "parquet", "text"):
        settings = {
            "source": kind,
            "paths": [str(_write_source(root, kind))],
            "streaming": True,
            "sample_documents": 40,
            "shuffle_window": 7,
            "vocab_size": 300,
            "sequence_length": LENGTH,
            "validation_fraction": 0.1,
            "cache_dir": str(root / "cache"),
        }
        config = DataConfig.model_validate(settings)
        corpus = prepare_corpus(config, progress=False)
        assert isinstance(corpus, PreparedStream)
        found[kind] = (config, corpus)
    return found


def _loader(
    stream: tuple[DataConfig, PreparedStream], rank: int = 0, degree: int = 1, **options: Any
) -> StreamingLoader:
    config = stream[0].model_copy(update=options.pop("data", {}))
    defaults: dict[str, Any] = {"seed": 5, "global_size": 6, "micro_size": 1, "prefetch_steps": 0}
    return StreamingLoader(stream[1], config, dp_rank=rank, dp_degree=degree, **(defaults | options))


def _equal(first: list[MicroBatch], second: list[MicroBatch]) -> bool:
    pairs = [(a.samples, b.samples) for a, b in zip(first, second, strict=True)]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def _through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


@pytest.mark.parametrize(("rank", "degree"), [(0, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
def test_a_restart_at_any_step_gives_the_same_batches(streams: Any, kind: str, rank: int, degree: int) -> None:
    options = {"data": {"document_mask": True}}
    whole = _loader(streams[kind], rank, degree, **options)
    steps, states = [], [_through_json(whole.state())]
    # Beyond the end of the source, so that epochs follow one another.
    for _ in range(120 // degree * 2):
        steps.append(whole.next_step())
        states.append(_through_json(whole.state()))
    assert states[-1]["stream"]["documents"]["epoch"] >= 1
    for start in (0, 1, 2, 3, 5, 8, 13, 21, 34, 45, len(steps) - 4):
        again = _loader(streams[kind], rank, degree, state=states[start], **options)
        # Continued and stopped at once, it is where it was.
        assert _through_json(again.state()) == states[start]
        for number in range(start, start + 3):
            assert _equal(again.next_step(), steps[number]), f"step {number} after a restart at {start}"
        # And a second time, from the state of the continued one.
        third = _loader(streams[kind], rank, degree, state=_through_json(again.state()), **options)
        assert _equal(third.next_step(), steps[start + 3])


def test_restarts_fall_into_the_middle_of_documents(streams: Any) -> None:
    loader = _loader(streams["jsonl"])
    inside = 0
    for _ in range(20):
        loader.next_step()
        inside += loader.state()["stream"]["num_tokens"] > 0
    assert inside > 10


def test_reading_ahead_changes_neither_batches_nor_states(streams: Any) -> None:
    one, other = _loader(streams["jsonl"]), _loader(streams["jsonl"], prefetch_steps=3)
    for _ in range(9):
        assert _equal(one.next_step(), other.next_step())
        assert one.state() == other.state()
    other.close()


def test_micro_batches_may_change(streams: Any) -> None:
    by_one, by_three = _loader(streams["jsonl"]), _loader(streams["jsonl"], micro_size=3)
    for _ in range(5):
        one, three = by_one.next_step(), by_three.next_step()
        assert len(three) == 2
        rows = [torch.cat([micro.samples["tokens"] for micro in step]) for step in (one, three)]
        assert torch.equal(rows[0], rows[1])


def test_positions_are_those_of_the_whole_step(streams: Any) -> None:
    for degree, micro_size in ((1, 6), (1, 2), (2, 1), (3, 2)):
        options = {"micro_size": micro_size, "global_size": 12, "start_sample": 36}
        loaders = [_loader(streams["jsonl"], rank, degree, **options) for rank in range(degree)]
        for first in (36, 48):
            steps = [loader.next_step() for loader in loaders]
            positions = torch.cat([micro.positions for group in zip(*steps, strict=True) for micro in group])
            assert positions.tolist() == list(range(first, first + 12))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_ranks_share_out_all_documents_but_those_held_out(streams: Any, kind: str, degree: int) -> None:
    config, corpus = streams[kind]
    seen: list[list[str]] = []
    for rank in range(degree):
        documents = DocumentStream(config, corpus.validation_limit, rank, degree, None)
        texts: list[str] = []
        while documents.state()["epoch"] == 0:
            texts += documents.next_texts(4)
        seen.append(texts)
    together = [text for texts in seen for text in texts]
    assert len(together) == len(set(together))
    missing = {text for text in map(_text, range(NUM_DOCUMENTS)) if text} - set(together)
    num_held_out = corpus.manifest.splits["validation"].num_documents
    assert 1 <= num_held_out <= len(missing) < 20


def test_each_epoch_trains_on_the_same_tokens_in_another_order(streams: Any) -> None:
    config, corpus = streams["jsonl"]
    plain = _loader((config, corpus), data={"shuffle": False}, global_size=7)
    shuffled = _loader((config, corpus), global_size=7)
    # A step is a window here.
    for _ in range(4):
        in_order = [micro.samples["tokens"][0].tolist() for micro in plain.next_step()]
        mixed = [micro.samples["tokens"][0].tolist() for micro in shuffled.next_step()]
        assert in_order != mixed
        assert sorted(in_order) == sorted(mixed)


def test_rows_are_the_documents_one_behind_the_other(streams: Any) -> None:
    from transformers import AutoTokenizer

    config, corpus = streams["text"]
    documents = DocumentStream(config, corpus.validation_limit, 0, 1, None)
    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_dir)
    expected: list[int] = []
    for _ in range(4):
        for text in documents.next_texts(8):
            expected += [*tokenizer(text, add_special_tokens=False).input_ids, corpus.eos_token_id]
    loader = _loader((config, corpus), data={"shuffle": False, "document_mask": True})
    rows = [next_token_batch(micro.samples) for _ in range(8) for micro in loader.next_step()]
    inputs = torch.cat([batch["input_ids"][0] for batch in rows])
    labels = torch.cat([batch["labels"][0] for batch in rows])
    positions = torch.cat([batch["position_ids"][0] for batch in rows])
    assert inputs.tolist() == expected[: len(inputs)]
    ends = inputs == corpus.eos_token_id
    assert torch.equal(labels == -100, ends)
    assert torch.equal(labels[~ends], torch.tensor(expected[1 : len(inputs) + 1])[~ends])
    starts = torch.cat([torch.tensor([True]), ends[:-1]]) | (torch.arange(len(inputs)) % LENGTH == 0)
    assert torch.equal(positions == 0, starts)


def test_the_standard_library_can_be_streamed(tmp_path: Path) -> None:
    config = DataConfig(streaming=True, sample_documents=30, vocab_size=400, sequence_length=64, shuffle_window=5)
    config = config.model_copy(update={"cache_dir": str(tmp_path)})
    corpus = prepare_corpus(config, progress=False)
    assert isinstance(corpus, PreparedStream)
    loader = _loader((config, corpus))
    first = loader.next_step()
    state = _through_json(loader.state())
    second = loader.next_step()
    assert not _equal(first, second)
    assert _equal(_loader((config, corpus), state=state).next_step(), second)


def test_another_number_of_ranks_is_refused() -> None:
    states = [{"window": rank} for rank in range(2)]
    assert state_of_rank(states, 24, 1, 2) == {"window": 1}
    assert state_of_rank([], 0, 0, 3) is None
    with pytest.raises(UserError, match=r"2 data-parallel ranks .* there are 3 now; .* start 2 ranks"):
        state_of_rank(states, 24, 1, 3)


def test_a_rank_without_documents_says_so(streams: Any, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    config = streams["jsonl"][0].model_copy(update={"paths": (str(tmp_path / "few.jsonl"),)})
    documents = DocumentStream(config, 0.0, 2, 3, None)
    with pytest.raises(UserError, match="no documents to train on for data-parallel rank 2 of 3"):
        documents.next_texts(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"streaming": False, "shuffle_window": 5}, "data.shuffle_window=5 goes with data.streaming=true only"),
        ({"streaming": True, "max_documents": 5}, "data.max_documents=5 goes with data.streaming=false only"),
        (
            {"streaming": True, "mixture": [{"name": "a", "weight": 1}]},
            "data.mixture goes with .*: a source's place",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = tiny_values(tmp_path, tmp_path, tmp_path)
    values["data"] = change
    with pytest.raises(UserError, match=message):
        parse_config(values, "test")


def _train_in_parts(ranks: Ranks, root: Path, values: dict[str, Any]) -> None:
    runs = RunsInProcess(ranks, root, root)
    whole, parts = (parse_config(values | {"name": name}, name) for name in ("whole", "parts"))
    runs.train_as(whole)
    # A stop gives up a step whose batches were taken already: they must come again.
    for step in (5, 6, 17):
        runs.train_as(parts, stop_at=step)
    runs.train_as(parts)


def _refuse_another_rank(ranks: Ranks, root: Path, values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="2 data-parallel ranks in the stream, and there are 3 now"):
        RunsInProcess(ranks, root, root).train_as(parse_config(values | {"name": "parts", "steps": 25}, "parts"))


def test_a_streamed_run_continues_bit_for_bit_and_refuses_other_ranks(tmp_path: Path) -> None:
    values = tiny_values(tmp_path / "runs", tmp_path / "cache", _write_source(tmp_path, "jsonl"))
    values["data"] |= {"source": "jsonl", "streaming": True, "sample_documents": 40, "shuffle_window": 5}
    values |= {"steps": 24, "checkpoint": {"keep_last": 0}, "schedule": {"total_steps": 60}}
    run_on_ranks(_train_in_parts, 2, tmp_path, values)
    whole, parts = (RunFolder(tmp_path / "runs" / name) for name in ("whole", "parts"))
    assert [step for step, _ in list_checkpoints(parts.checkpoints_dir)] == [4, 5, 16, 24]
    assert computed_lines(parts) == computed_lines(whole)
    run_on_ranks(_refuse_another_rank, 3, tmp_path, values | {"batch": {"global_size": 12, "micro_size": 2}})
    assert show([str(parts.path), "--step", "2"]) == 2
