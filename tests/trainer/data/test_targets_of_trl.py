"""Targets beside those that TRL makes of the same conversations, by chat templates of real models."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.trainer.data.chat_support import chat_tokenizer, turns
from trainer.data.chat_template import ChatTemplate

trl = pytest.importorskip("trl")
# What it says of the other libraries of its family is their matter.
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

CONVERSATIONS = [
    turns("What does dump do?", "It writes an object as JSON to a file."),
    turns("And dumps?", "It returns a text.", "Thank you!", "You are welcome.", system="Be brief."),
    turns("\u00e9\u4e2d?", "\u4e2d\u6587 na\u00efve\n\ntext.", "Again", "Yes.", "More", "No."),
]
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 3}}}
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CALLS = {
    "messages": [
        {"role": "user", "content": "Ask f."},
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "name": "f", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ],
    "tools": [_TOOL],
}
_CONTROL = re.compile(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>|\[/?INST\]")


def _source(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def _tokenizer(source: str) -> PreTrainedTokenizerFast:
    tokenizer = chat_tokenizer(source)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(_CONTROL.findall(source)))})
    # Those that end a turn are what ends a text in such a tokenizer.
    ends = [token for token in ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>") if token in source]
    tokenizer.eos_token = ends[0]
    return tokenizer


def _of_trl(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], folder: Path, **options: Any) -> list[Any]:
    """Input ids and labels, as its trainer prepares them."""
    from datasets import Dataset

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    config = trl.SFTConfig(output_dir=str(folder), max_length=None, report_to=[], use_cpu=True, bf16=False, **options)
    trainer = trl.SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def _ours(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    template = ChatTemplate(tokenizer, "the template")
    return [
        (ids.tolist(), [token if is_target else -100 for token, is_target in zip(ids.tolist(), targets, strict=True)])
        for ids, targets in template.encode(template.render(row, "here"))
    ]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen2_5_training", "llama3", "qwen3_training"])
def test_targets_of_whole_conversations(name: str, tmp_path: Path) -> None:
    rows = CONVERSATIONS if name == "llama3" else [*CONVERSATIONS, CALLS]
    tokenizer = _tokenizer(_source(name))
    ours = [part for row in rows for part in _ours(tokenizer, row)]
    # Its columns are those of the first row.
    theirs = _of_trl(tokenizer, [{"tools": None} | row for row in rows], tmp_path, assistant_only_loss=True)
    assert [ids for ids, _ in ours] == [ids for ids, _ in theirs]
    if name == "qwen2_5":
        # Of this one, TRL's edition for training has the line's end in the generation prompt among the targets.
        begin = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
        for ids, labels in theirs:
            for end in range(len(begin), len(ids) + 1):
                if ids[end - len(begin) : end] == begin:
                    assert labels[end - 1] == begin[-1]
                    labels[end - 1] = -100
    assert ours == theirs


@pytest.mark.parametrize("name", ["qwen3", "qwen3_training"])
def test_targets_of_turns_where_a_template_forgets(name: str, tmp_path: Path) -> None:
    reasoning = turns("Think.", "<think>\nHm.\n</think>\n\nDone.", "Again.", "<think>\nWell.\n</think>\n\nDone again.")
    tokenizer = _tokenizer(_source(name))
    parts = _ours(tokenizer, reasoning)
    messages = reasoning["messages"]
    if name == "qwen3_training":
        (theirs,) = _of_trl(tokenizer, [reasoning], tmp_path, assistant_only_loss=True)
        assert parts == [theirs]
        return
    # Each answer behind what was said before as the template writes it then, which TRL has for a prompt and completion.
    turns_apart = [{"prompt": messages[:i], "completion": [messages[i]]} for i in (1, 3)]
    theirs = _of_trl(tokenizer, turns_apart, tmp_path, completion_only_loss=True)
    assert parts == theirs
