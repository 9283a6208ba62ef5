"""Conversations from rows to samples: what is read, what is refused, what is packed with what."""

import ast
import json
import sys
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sharding.engine import Batch
from sharding.ranks.errors import UserError
from tests.support import TINY_MODEL
from tests.trainer.data.chat_support import CHATML, FORGETS, chat_tokenizer, turns
from trainer.config import RunConfig, parse_config
from trainer.config.data import SourceConfig
from trainer.data.chat_template import ChatTemplate
from trainer.data.conversations import hub_conversation
from trainer.data.documents import samples_at
from trainer.data.pack_conversations import best_fit_decreasing
from trainer.data.packed import packed_samples
from trainer.data.prepare import describe_corpus, prepare_corpus
from trainer.data.prepared import PreparedCorpus
from trainer.data.stdlib_questions import stdlib_questions
from trainer.report.excerpts import _first_document
from trainer.tasks.causal_lm import CausalLanguageModelling, check_targets
from trainer.tasks.next_tokens import IGNORED_LABEL, next_token_batch

LENGTH = 96


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    chat_tokenizer(CHATML).save_pretrained(folder)
    return folder


def _rows(number: int) -> list[dict[str, Any]]:
    """Conversations of different lengths, all of which fit into a sample."""
    generator = np.random.default_rng(3)
    return [
        turns(f"q{i} " + "x" * int(generator.integers(1, 20)), f"a{i} " + "y" * int(generator.integers(1, 20)))
        for i in range(number)
    ]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _config(root: Path, folder: Path, path: Path, **data: Any) -> RunConfig:
    settings = {
        "source": "jsonl",
        "format": "messages",
        "paths": [str(path)],
        "tokenizer": str(folder),
        "sequence_length": LENGTH,
        "validation_fraction": 0.2,
        "cache_dir": str(root / "cache"),
    }
    values = {"steps": 1, "model": TINY_MODEL, "data": settings | data, "batch": {"global_size": 2, "micro_size": 2}}
    return parse_config(values, "test")


def _prepared(config: RunConfig) -> PreparedCorpus:
    corpus = prepare_corpus(config.data, progress=False)
    assert isinstance(corpus, PreparedCorpus)
    return corpus


def test_a_row_holds_whole_conversations_and_their_targets(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = _rows(60)
    config = _config(tmp_path, tokenizer_folder, _write(tmp_path / "a.jsonl", rows))
    assert config.data.document_mask
    corpus = _prepared(config)
    template = ChatTemplate(chat_tokenizer(CHATML), "the template")
    encoded = {
        tuple(ids.tolist()): targets.tolist()
        for row in rows
        for ids, targets in template.encode(template.render(row, "here"))
    }
    samples = packed_samples(corpus, config.data)
    found = []
    for split in ("train", "validation"):
        number = samples.num_samples(split)
        batch = samples.read(split, list(range(number)))
        assert batch["tokens"].shape == (number, LENGTH + 1)
        # A row begins with a conversation, and so does the next one.
        assert batch["document_starts"][:, 0].all()
        assert batch["document_starts"][:-1, LENGTH].all()
        labels = next_token_batch(batch)["labels"]
        for row in range(number):
            starts = [*batch["document_starts"][row, :LENGTH].nonzero()[:, 0].tolist(), LENGTH]
            for begin, end in pairwise(starts):
                ids = batch["tokens"][row, begin:end].tolist()
                targets = batch["is_target"][row, begin:end].tolist()
                # The last one of a row is filled up, without targets.
                fits = [one for one in encoded if ids[: len(one)] == list(one)]
                whole = max(fits, key=len)
                assert targets == encoded[whole] + [False] * (len(ids) - len(whole))
                assert set(ids[len(whole) :]) <= {corpus.manifest.pad_token_id}
                expected = [i if t else IGNORED_LABEL for i, t in zip(ids, targets, strict=True)][1:]
                assert labels[row, begin : end - 1].tolist() == expected
                found.append(whole)
        assert corpus.manifest.conversations is not None
        of_split = corpus.manifest.conversations.num_targets[split]
        assert int((labels != IGNORED_LABEL).sum()) == of_split > 0
    assert sorted(found) == sorted(encoded)
    # Nearly full, and the same wherever and in whichever order of reading it was prepared.
    num_tokens = sum(map(len, encoded))
    assert num_tokens > 0.9 * sum(split.num_tokens for split in corpus.manifest.splits.values())
    again = _config(tmp_path / "again", tokenizer_folder, tmp_path / "a.jsonl")
    assert _prepared(again).fingerprint == corpus.fingerprint


def test_parquet_and_another_column_give_the_same(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = _rows(30)
    call = {"function": {"arguments": {"x": 1, "y": None}, "name": "f"}}
    calls = {"role": "assistant", "content": "", "tool_calls": [call]}
    rows[0]["messages"] += [{"role": "user", "content": "u"}, calls]
    rows[0]["tools"], rows[1]["tools"] = None, [{"name": "f"}]
    for row in rows:
        row["talk"] = row.pop("messages")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    del call["function"]["arguments"]["y"]
    _write(tmp_path / "a.jsonl", rows)
    of_both = [
        _prepared(_config(tmp_path, tokenizer_folder, path, source=source, messages_field="talk")).fingerprint
        for source, path in (("parquet", tmp_path / "a.parquet"), ("jsonl", tmp_path / "a.jsonl"))
    ]
    assert of_both[0] == of_both[1]


def test_what_is_cut_dropped_or_divided_is_counted_and_named(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _rows(20)
    rows[3] = turns("q", "a " * 400)
    rows[5] = turns("q " * 400, "a")
    rows[7] = turns("only a question")
    rows[9] = turns("q", "<think>a</think>b", "q", "<think>a</think>b")
    path = _write(tmp_path / "a.jsonl", rows)
    tokenizer = chat_tokenizer(FORGETS)
    tokenizer.save_pretrained(tmp_path / "forgets")
    config = _config(tmp_path, tmp_path / "forgets", path)
    facts = _prepared(config).manifest.conversations
    assert facts is not None
    assert (facts.num_cut, facts.num_without_target, facts.num_divided) == (2, 2, 1)
    assert "2 conversations cut, 1 divided; 2 without a target dropped" in describe_corpus(_prepared(config))
    shown = _config(tmp_path / "shown", tmp_path / "forgets", path)
    prepare_corpus(shown.data, progress=True)
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        f"2 conversations are longer than data.sequence_length={LENGTH} tokens and cut: ",
        *(f"{path}#{row}" for row in (3, 5, 7)),
        "2 conversations have no target and are dropped: ",
        "1 conversations are divided, since the chat template writes earlier turns otherwise once another follows: "
        f"{path}#9",
    ):
        assert words in printed


def test_as_a_stream_conversations_are_cut_where_a_sample_ends(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = _write(tmp_path / "a.jsonl", _rows(40))
    whole = _prepared(_config(tmp_path, tokenizer_folder, path)).manifest
    for document_mask in (True, False):
        config = _config(tmp_path, tokenizer_folder, path, packing="stream", document_mask=document_mask)
        stream = _prepared(config).manifest
        assert whole.conversations is not None
        assert stream.conversations is not None
        assert stream.conversations.num_targets == whole.conversations.num_targets
        assert stream.splits["train"].num_tokens < whole.splits["train"].num_tokens
        batch = packed_samples(_prepared(config), config.data).read("train", [0, 1])
        assert ("document_starts" in batch) == document_mask
        assert "is_target" in batch


def test_texts_of_a_mixture_are_targets_and_what_users_say_is_not(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text {number} " * 30)
    talk = {"name": "talk", "weight": 1, "source": "jsonl", "format": "messages"}
    texts = {"name": "texts", "weight": 1, "source": "text", "paths": [str(tmp_path / "texts")]}
    mixture = [talk | {"paths": [str(_write(tmp_path / "a.jsonl", _rows(40)))]}, texts]
    data = {"mixture": mixture, "tokenizer": str(tokenizer_folder), "sequence_length": LENGTH}
    values = {"steps": 1, "model": TINY_MODEL, "data": data | {"cache_dir": str(tmp_path / "cache")}}
    config = parse_config(values, "test")
    assert config.data.document_mask
    corpus = prepare_corpus(config.data, progress=False)
    samples = packed_samples(corpus, config.data)
    of_talk = corpus.corpora[0].stream("train").num_samples(LENGTH)
    batch = samples.read("train", [0, of_talk])
    assert 0 < int(batch["is_target"][0].sum()) < LENGTH
    assert batch["is_target"][1].all()
    assert int(batch["tokens"].max()) < corpus.vocab_size
    # Texts are prepared as they were before there were conversations.
    said, written = (json.loads((one.folder / "manifest.json").read_text()) for one in corpus.corpora)
    assert said.keys() - written.keys() == {"conversations"}
    assert (said["dtype"], written["dtype"]) == ("<u4", "<u2")
    shown = {one.source: one for one in samples_at(config, corpus, np.arange(8))}
    assert shown["texts"].is_target is None
    assert shown["texts"].num_targets == LENGTH
    assert shown["talk"].is_target is not None
    assert shown["talk"].num_targets < LENGTH


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"conversation": []}, "data.messages_field=messages is not a column of line 2 of"),
        ({"messages": []}, "line 2 of {path} has an empty conversation"),
        ({"messages": "hello"}, "line 2 of {path} is a text and no list of messages"),
        ({"messages": None}, "line 2 of {path} is null and no list of messages"),
        ({"messages": ["hello"]}, "has a message 0 that is a text and no object"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "has a message 0 whose content is a list and no text"),
        ({"messages": [{"role": "user", "content": None}]}, "has a message 0 whose content is null and no text"),
        ({"messages": [{"role": "human", "content": "a"}]}, "has a message 0 with the role 'human', none of system"),
        ({"messages": [{"content": "a"}]}, "has a message 0 with no role, none of system"),
        (turns("a", "b", "c") | {"tools": "{"}, "has tools that are no JSON"),
        (turns("a", "b", "c") | {"tools": [3]}, "has tools that are no list of descriptions"),
        ({"messages": turns("a", "b")["messages"][::-1]}, "roles out of order: message 0 is of assistant and follows"),
        ({"messages": turns("a")["messages"] * 2}, "roles out of order: message 1 is of user and follows user"),
        ({"messages": [*turns("a", "b")["messages"], {"role": "system", "content": "s"}]}, "message 2 is of system"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}, "message 1 is of tool"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(
    tmp_path: Path, tokenizer_folder: Path, row: dict[str, Any], words: str
) -> None:
    path = _write(tmp_path / "a.jsonl", [turns("a", "b"), row, turns("c", "d")])
    with pytest.raises(UserError) as refusal:
        _prepared(_config(tmp_path, tokenizer_folder, path))
    assert words.format(path=path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_row_of_the_hub_has_no_null_in_it() -> None:
    source = SourceConfig(source="hub", hub_name="talk", format="messages")
    row = turns("a", "b")
    row["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": {"x": None}}}]
    kept = json.loads(hub_conversation(row | {"tools": None}, source, "row 3 of talk"))
    assert kept["messages"][1]["tool_calls"] == [{"function": {"name": "f", "arguments": {}}}]
    assert kept.keys() == {"messages"}
    with pytest.raises(UserError, match=r"is not a column of row 3 of talk, which has text; name the one"):
        hub_conversation({"text": "a"}, source, "row 3 of talk")


def test_a_file_without_a_target_is_an_error(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "files").mkdir()
    _write(tmp_path / "files" / "a.jsonl", _rows(5))
    silent = _write(tmp_path / "files" / "b.jsonl", [turns("a"), turns("b")])
    with pytest.raises(UserError, match=f"{silent} has no target: in none of its conversations the assistant says"):
        _prepared(_config(tmp_path, tokenizer_folder, tmp_path / "files"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"streaming": True}, "data.streaming=true goes with data.format=auto or packed only, but it is messages"),
        ({"source": "text"}, "data.source=text has no conversations"),
        ({"text_field": "body"}, "data.text_field=body is for texts"),
        ({"document_mask": False}, "data.document_mask=false lets the conversations of a sample see one another"),
        ({"tokenizer": "train-bpe"}, "data.chat_template is not set, and a tokenizer that is trained"),
        ({"format": "packed", "packing": "whole"}, "data.packing=whole is for conversations"),
        ({"format": "packed", "chat_template": "plain"}, "data.chat_template=plain is for conversations"),
        ({"format": "packed", "messages_field": "talk"}, "data.messages_field=talk is for conversations"),
    ],
)
def test_settings_that_do_not_go_with_conversations_are_refused(
    tmp_path: Path, tokenizer_folder: Path, data: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as refusal:
        _config(tmp_path, tokenizer_folder, tmp_path, **data)
    assert words in str(refusal.value)


@pytest.mark.parametrize("task", ["masked-lm", "sequence-classification"])
def test_other_tasks_are_refused(tmp_path: Path, task: str) -> None:
    data = {"source": "jsonl", "format": "messages", "paths": [str(tmp_path)], "chat_template": "plain"}
    values = {"steps": 1, "model": TINY_MODEL, "data": data, "task": {"name": task}}
    with pytest.raises(UserError, match=f"task.name={task}"):
        parse_config(values, "test")


@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_decreasing_keeps_to_its_bound(lengths: list[int]) -> None:
    bins = best_fit_decreasing(lengths, 20)
    assert sorted(index for one in bins for index in one) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in one) <= 20 for one in bins)
    assert bins == sorted(sorted(one) for one in bins)
    assert 9 * len(bins) <= 11 * max(-(-sum(lengths) // 20), 0) + 6 + 9 * sum(length > 10 for length in lengths)


def test_best_fit_decreasing_takes_the_fullest_bin() -> None:
    assert best_fit_decreasing([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit_decreasing([], 10) == []


def test_the_embedded_conversations_are_of_the_standard_library() -> None:
    questions = list(islice(stdlib_questions(), 1500))
    texts = [json.loads(question.conversation)["messages"] for question in questions]
    assert all([message["role"] for message in messages] == ["user", "assistant"] for messages in texts)
    answers = [messages[1]["content"] for messages in texts]
    # No answer is on both sides of a split, whatever the modules.
    assert len(set(answers)) == len(answers)
    by_id = {question.source_id: messages for question, messages in zip(questions, texts, strict=True)}
    assert "Shallow copy operation on arbitrary Python objects." in by_id["copy.py#copy.copy-0"][1]["content"]
    assert by_id["copy.py#copy.deepcopy-1"][1]["content"] == "copy.deepcopy(x, memo=None, _nil=[])"
    names = {module for module in sys.modules if module.startswith("antigravity")}
    assert not names, "a source file was imported"
    assert all(ast.parse(a.partition("(")[0]) for a in answers[1::2] if "(" in a and " " not in a.partition("(")[0])


def test_modules_stay_on_one_side(tmp_path: Path) -> None:
    data = {
        "source": "stdlib-conversations",
        "chat_template": "chatml",
        "vocab_size": 300,
        "sequence_length": 256,
        "validation_fraction": 0.2,
        "max_documents": 400,
        "cache_dir": str(tmp_path),
    }
    config = parse_config({"steps": 1, "model": TINY_MODEL, "data": data}, "test")
    corpus = _prepared(config)
    modules: dict[str, set[str]] = {}
    for split in ("train", "validation"):
        stream = corpus.stream(split)
        spans = stream.documents_between(0, stream.num_tokens)
        modules[split] = {span.source_id.partition("#")[0] for span in spans}
    assert modules["train"]
    assert modules["validation"]
    assert not modules["train"] & modules["validation"]


def test_the_report_shows_a_conversation(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = _write(tmp_path / "a.jsonl", [turns("What is it?", "This.")])
    corpus = _prepared(_config(tmp_path, tokenizer_folder, path, validation_fraction=0.0))
    excerpt = _first_document(corpus, "train")
    assert excerpt is not None
    assert excerpt.text.startswith("user\nWhat is it?\nassistant\nThis.\n")


class _TrainsOnAll(CausalLanguageModelling):
    """Forgets that only what the assistant says is a target."""

    def make_batch(self, samples: Batch, positions: torch.Tensor, training: bool) -> Batch:
        return {"input_ids": samples["tokens"][:, :-1], "labels": samples["tokens"][:, 1:]}


def test_a_task_of_ones_own_that_trains_on_users_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    config = _config(tmp_path, tokenizer_folder, _write(tmp_path / "a.jsonl", _rows(6)))
    samples = packed_samples(_prepared(config), config.data)
    check_targets("own", CausalLanguageModelling(), samples)
    with pytest.raises(UserError, match=r"task.name=own has \d+ targets in the first sample, in which"):
        check_targets("own", _TrainsOnAll(), samples)
