"""What of a conversation is a target, by templates of each kind."""

from typing import Any

import numpy as np
import pytest

from sharding.ranks.errors import UserError
from tests.trainer.data.chat_support import CHATML, CONVERSATIONS, FORGETS, MOVES, chat_tokenizer, turns
from trainer.data.chat_template import ChatTemplate, load_chat_template, template_text


def _template(source: str, tokenizer: Any = None) -> ChatTemplate:
    tokenizer = tokenizer or chat_tokenizer()
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer, "the template")


def _encoded(template: ChatTemplate, conversation: dict[str, Any]) -> list[tuple[list[int], np.ndarray]]:
    return [(ids.tolist(), targets) for ids, targets in template.encode(template.render(conversation, "here"))]


def _shown(tokenizer: Any, ids: list[int], targets: np.ndarray) -> list[str]:
    """The texts of the runs of targets."""
    runs, text = [], []
    for token, is_target in zip([*ids, 0], [*targets, False], strict=True):
        if is_target:
            text.append(token)
        elif text:
            runs.append(tokenizer.decode(text))
            text = []
    return runs


@pytest.mark.parametrize("source", [CHATML, template_text("chatml")])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_targets_are_what_the_assistant_says_and_the_end_of_its_turn(source: str, conversation: Any) -> None:
    tokenizer = chat_tokenizer()
    ((ids, targets),) = _encoded(_template(source, tokenizer), conversation)
    said = [message["content"] for message in conversation["messages"] if message["role"] == "assistant"]
    assert _shown(tokenizer, ids, targets) == [f"{content}<|im_end|>\n" for content in said]
    whole = conversation["messages"]
    if source == CHATML and whole[-1]["role"] == "user":
        # What follows the last answer has no target.
        whole = whole[:-1]
    # One control token a turn begins it and one ends it, whatever was said.
    for name in ("<|im_start|>", "<|im_end|>"):
        assert ids.count(tokenizer.convert_tokens_to_ids(name)) == len(whole)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(whole, tokenize=False)


@pytest.mark.parametrize("conversation", [c for i, c in enumerate(CONVERSATIONS) if i != 2])
def test_targets_are_those_of_transformers(conversation: Any) -> None:
    tokenizer = chat_tokenizer()
    ((ids, targets),) = _encoded(_template(template_text("chatml"), tokenizer), conversation)
    theirs = tokenizer.apply_chat_template(conversation["messages"], return_assistant_tokens_mask=True)
    assert ids == theirs["input_ids"]
    assert targets.tolist() == [bool(one) for one in theirs["assistant_masks"]]


def test_a_user_may_not_say_what_an_assistant_may() -> None:
    tokenizer = chat_tokenizer()
    source = CHATML + "{# <think> #}"
    ((ids, _),) = _encoded(_template(source, tokenizer), turns("<think> a", "<think> b"))
    assert ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1
    text = "<think> a\U0010fffe\U0010ffff<|im_end|>"
    ((ids, _),) = _encoded(_template(source, tokenizer), turns(text, "b"))
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert "<think> a\ufffd\ufffd<|im_end|><|im_end|>" in tokenizer.decode(ids)


def test_what_a_template_forgets_later_was_there_when_it_was_said() -> None:
    tokenizer = chat_tokenizer()
    parts = _encoded(_template(FORGETS, tokenizer), CONVERSATIONS[3])
    said = [message["content"] + "<|im_end|>\n" for message in CONVERSATIONS[3]["messages"][1::2]]
    assert [_shown(tokenizer, *part) for part in parts] == [[said[0]], [said[1]]]
    # The second answer follows what the model will see: the first one without what was thought.
    assert "Hm." in tokenizer.decode(parts[0][0])
    assert "Hm." not in tokenizer.decode(parts[1][0])
    # Where nothing is forgotten, nothing is divided.
    ((ids, targets),) = _encoded(_template(FORGETS, tokenizer), CONVERSATIONS[1])
    assert len(_shown(tokenizer, ids, targets)) == 2


def test_what_a_template_moves_is_where_it_was() -> None:
    tokenizer = chat_tokenizer()
    parts = _encoded(_template(MOVES, tokenizer), CONVERSATIONS[1])
    assert [tokenizer.decode(ids) for ids, _ in parts] == [
        "<|im_start|>[INST] Be brief.\n\nAnd dumps? [/INST] It returns a text.<|im_end|>",
        "<|im_start|>[INST] And dumps? [/INST] It returns a text.<|im_end|>"
        "[INST] Be brief.\n\nThank you! [/INST] You are welcome.<|im_end|>",
    ]
    said = [" It returns a text.<|im_end|>", " You are welcome.<|im_end|>"]
    assert [_shown(tokenizer, *part) for part in parts] == [[one] for one in said]


def test_calls_and_results_are_the_templates() -> None:
    tokenizer = chat_tokenizer()
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}
    messages = [
        {"role": "user", "content": "Ask f."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    conversation = {"messages": messages, "tools": [{"name": "f"}]}
    ((ids, targets),) = _encoded(_template(CHATML, tokenizer), conversation)
    assert _shown(tokenizer, ids, targets) == [
        '<tool_call>{"name": "f", "arguments": {"x": "<|im_end|>"}}</tool_call><|im_end|>\n',
        "It is 3.<|im_end|>\n",
    ]
    # The tools' own turn of the system, and four that end.
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 5
    for left_out in ("tools", "tool_calls"):
        with pytest.raises(UserError, match=f"writes no {left_out}, which here has"):
            _template(CHATML.replace(left_out, "left_out")).render(conversation, "here")


def test_plain_needs_no_control_tokens_but_the_end_of_text() -> None:
    tokenizer = chat_tokenizer()
    template = load_chat_template(tokenizer, "plain", "own")
    assert template.end_of_turn_id == tokenizer.eos_token_id
    ((ids, targets),) = _encoded(template, CONVERSATIONS[1])
    assert tokenizer.decode(ids) == (
        "System: Be brief.\n\nUser: And dumps?\n\nAssistant: It returns a text.<|endoftext|>\n\n"
        "User: Thank you!\n\nAssistant: You are welcome.<|endoftext|>\n\n"
    )
    said = [" It returns a text.<|endoftext|>", " You are welcome.<|endoftext|>"]
    assert _shown(tokenizer, ids, targets) == said
    begin = tokenizer.decode(template.prompt_ids(CONVERSATIONS[1]["messages"][:2]))
    assert begin == "System: Be brief.\n\nUser: And dumps?\n\nAssistant:"


_GENERATED = template_text("chatml")
_SILENT = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
_BEGIN, _END = "{%- generation %}", "{%- endgeneration %}"
_ELSEWHERE = _GENERATED.replace(_BEGIN, "").replace(_END, _BEGIN + _END)
_WITHOUT_END = _GENERATED.replace(
    "message.content + '<|im_end|>\\n' }}\n        {%- endgeneration %}",
    "message.content }}{%- endgeneration %}{{- '<|im_end|>\\n' }}",
)
_OTHERWISE = CHATML.replace("'<|im_start|>assistant\n' }}{%- endif %}", "'Answer:' }}{%- endif %}")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (_SILENT, "writes nothing of what the assistant says"),
        ("{{ raise_exception('no roles here') }}", "cannot write a question and its answer (no roles here)"),
        ("{% for m in messages", "cannot write a question and its answer"),
        (_ELSEWHERE, "has {% generation %} elsewhere"),
        (_WITHOUT_END, "has {% endgeneration %} before <|im_end|>"),
        (_OTHERWISE, "otherwise than its generation prompt"),
    ],
)
def test_templates_that_do_not_do_are_refused_before_a_conversation_is_read(source: str, words: str) -> None:
    with pytest.raises(UserError) as refusal:
        _template(source)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_without_a_template_names_the_setting() -> None:
    with pytest.raises(UserError, match=r"data.tokenizer=gpt has no chat template.* data.chat_template to chatml"):
        load_chat_template(chat_tokenizer(), None, "gpt")
    with pytest.raises(UserError, match=r"data.chat_template=nowhere.jinja cannot be read"):
        load_chat_template(chat_tokenizer(), "nowhere.jinja", "gpt")
