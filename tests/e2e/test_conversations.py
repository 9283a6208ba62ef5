"""Conversations from rows to answers: trained, shown, evaluated, exported, asked; and refused before ranks start."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import TINY_MODEL, read_metrics, refused, shardline, trained
from tests.trainer.data.chat_support import chat_tokenizer, turns

MakeConfig = Callable[..., Path]

_ANSWERS = {"Who are you?": "A small model.", "What is 2 + 2?": "It is 4.", "Say end.": "<|im_end|> is said."}


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _sections(path: str) -> dict[str, Any]:
    return {
        "steps": 80,
        "model": TINY_MODEL | {"config": TINY_MODEL["config"] | {"max_position_embeddings": 128}},
        "data": {
            "source": "jsonl",
            "format": "messages",
            "chat_template": "chatml",
            "paths": [path],
            "sequence_length": 96,
            "validation_fraction": 0.0,
        },
        "batch": {"global_size": 2, "micro_size": 1},
        "schedule": {"name": "constant", "warmup_steps": 5, "total_steps": 0},
        "metrics": {"every_steps": 20},
    }


def test_from_rows_to_answers(make_config: MakeConfig, tmp_path: Path) -> None:
    rows = [turns(question, answer) for question, answer in _ANSWERS.items()]
    config = make_config("chat", **_sections(_write(tmp_path / "a.jsonl", rows)))
    run = config.parent / "runs" / "chat"
    trained(shardline("run", config, "--nproc-per-node", 2))
    assert read_metrics(run)[-1]["train/loss"] < 0.2

    shown = shardline("data", "show", run, "--step", 1, "--limit", 2).stdout
    for question, answer in _ANSWERS.items():
        assert f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{{+{answer}<|im_end|>\n+}}" in shown

    said = shardline("generate", run, "--chat", "--prompt", "Say end.", "--temperature", 0)
    assert said.stdout.strip() == _ANSWERS["Say end."], said.stderr

    other = _write(tmp_path / "b.jsonl", [turns("Who are you?", "A small model."), turns("Who?", "Not that.")])
    evaluated = shardline("evaluate", run, "--data", other)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "perplexity" in evaluated.stdout

    folder = tmp_path / "exported"
    assert shardline("export", run, "--to", folder).returncode == 0
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 2?"}], add_generation_prompt=True, return_tensors="pt"
    )
    output = model.generate(**prompt, do_sample=False, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
    # It ends with the turn, since the export says which token that is.
    assert tokenizer.decode(output) == "It is 4.<|im_end|>"


@pytest.mark.parametrize(
    ("change", "rows", "words"),
    [
        ({}, [turns("a", "b"), {"messages": []}], "line 2 of {path} has an empty conversation"),
        ({}, [turns("a")], "{path} has no target"),
        ({"tokenizer": "without"}, [turns("a", "b")], "data.tokenizer={folder}/without has no chat template"),
        ({"tokenizer": "with"}, [turns("a", "b")], "has no tokens for, so that no turn would have an end"),
    ],
)
def test_what_cannot_be_learnt_is_said_before_ranks_start(
    make_config: MakeConfig, tmp_path: Path, change: dict[str, str], rows: list[dict[str, Any]], words: str
) -> None:
    sections = _sections(_write(tmp_path / "a.jsonl", rows))
    if change:
        tokenizer = chat_tokenizer(None)
        if change["tokenizer"] == "without":
            del sections["data"]["chat_template"]
        else:
            from tests.trainer.data.test_tokenizer import _byte_level

            tokenizer = _byte_level()
        tokenizer.save_pretrained(tmp_path / change["tokenizer"])
        sections["data"]["tokenizer"] = str(tmp_path / change["tokenizer"])
    config = make_config("chat", **sections)
    sentence = words.format(path=tmp_path / "a.jsonl", folder=tmp_path)
    refused(shardline("run", config, "--nproc-per-node", 2), sentence)
    if change:
        refused(shardline("run", config, "--nproc-per-node", 2, "--dry-run"), sentence)
