"""Stages of unlike sources in one run: texts, a stream, and conversations, each stopped inside and at its end."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, computed_lines, saved_state
from tests.support import run_on_ranks, tiny_values, write_corpus
from tests.trainer.data.chat_support import CHATML, chat_tokenizer, turns
from trainer.config import RunConfig, parse_config
from trainer.config.stages import stages_of
from trainer.faults.injection.inject import Fault
from trainer.run_folder.folder import RunFolder
from trainer.runtime.phases import Phase

_LAST = 11


def _write_sources(root: Path) -> None:
    write_corpus(root / "corpus")
    texts = [f"document {n} says " + f"word{n} " * (1 + n * 7 % 40) for n in range(90)]
    (root / "stream.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = [turns(f"What is {n} + {n}?", f"It is {2 * n}.") for n in range(80)]
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat_tokenizer(CHATML).save_pretrained(root / "tokenizer")


def _config(root: Path, **values: Any) -> RunConfig:
    merged = tiny_values(root / "runs", root / "cache", root / "corpus")
    del merged["data"]["vocab_size"]
    merged["data"] |= {"tokenizer": str(root / "tokenizer")}
    stream = {"source": "jsonl", "paths": [str(root / "stream.jsonl")], "streaming": True, "sample_documents": 30}
    chats = {"source": "jsonl", "paths": [str(root / "chats.jsonl")], "format": "messages", "sequence_length": 48}
    stages = [
        {"name": "texts", "steps": 3},
        {"name": "stream", "steps": 4, "data": stream | {"shuffle_window": 5}},
        {"name": "chats", "steps": 4, "data": chats, "batch": {"global_size": 4, "micro_size": 2}},
    ]
    merged |= {"name": "whole", "steps": None, "stages": stages, "checkpoint": {"every_steps": 4, "keep_last": 0}}
    return parse_config(merged | {"evaluation": {"every_steps": 2}} | values, "test")


def _train(ranks: Ranks, root: Path) -> None:
    runs = RunsInProcess(ranks, root, root / "corpus")
    config = _config(root)
    runs.train_as(config)
    pieces = config.model_copy(update={"name": "pieces"})
    for stop_at in (2, 6, 9):
        runs.train_as(pieces, stop_at=stop_at)
    runs.train_as(pieces)
    # Without a save but at each stage's end, from which the next one begins.
    seldom = config.checkpoint.model_copy(update={"every_steps": 0})
    killed = config.model_copy(update={"name": "killed", "checkpoint": seldom})
    for step in (5, 9):
        with pytest.raises(RuntimeError):
            runs.train_as(killed, [Fault(fault="raise", rank=ranks.rank, step=step, phase=Phase.TRAIN)])
    runs.train_as(killed)
    # What each stage begins with, by a run that has nothing else.
    for stage in stages_of(config)[1:]:
        origin = f"{root / 'runs' / 'whole'}@{stage.first_step}"
        source = config.checkpoint.model_copy(update={"from_": origin, "load": "weights"})
        runs.train_as(stage.config.model_copy(update={"name": f"alone-{stage.name}", "checkpoint": source, "steps": 1}))


def test_texts_a_stream_and_conversations_are_stages_of_one_run(tmp_path: Path) -> None:
    _write_sources(tmp_path)
    run_on_ranks(_train, 2, tmp_path, timeout_s=250)
    folders = {path.name: RunFolder(path) for path in (tmp_path / "runs").iterdir()}
    lines = computed_lines(folders["whole"])
    assert [line["train/stage"] for line in lines] == [1] * 3 + [2] * 4 + [3] * 4
    tokens = [0, *(line["train/tokens"] for line in lines)]
    counted = [after - before for before, after in pairwise(tokens)]
    # Every token of texts is a target, and of conversations those alone that the assistant says.
    assert counted[:7] == [12 * 32] * 7
    assert all(0 < number < 4 * 48 / 2 for number in counted[7:])
    state = saved_state(folders["whole"], _LAST)
    for name in ("pieces", "killed"):
        assert computed_lines(folders[name]) == lines
        training, tensors = saved_state(folders[name], _LAST)
        assert training == state[0].model_copy(update={"trackers": training.trackers})
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in state[1].items())
    for step, name in ((4, "stream"), (8, "chats")):
        assert computed_lines(folders[f"alone-{name}"])[0]["train/loss"] == lines[step - 1]["train/loss"]
    evaluated = [line["step"] for line in lines if "eval/loss" in line]
    assert evaluated == [2, 3, 4, 6, 7, 8, 10, 11]
