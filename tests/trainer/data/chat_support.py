"""Chat templates of the kinds that models come with, conversations, and a tokenizer for them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from trainer.data.tokenizer import train_byte_level_bpe

# As Qwen2.5's: a default for the system, tools, and no {% generation %}.
CHATML = """
{%- if tools %}{{- '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
# As those of reasoning models: what was thought before the last question is left out.
FORGETS = """
{%- set last = namespace(user=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and '</think>' in message.content and loop.index0 < last.user %}
        {{- message.content.split('</think>')[-1].lstrip('\n') }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
# As Mistral's: the system's message is put before the last question.
MOVES = """
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set rest = messages[1:] if system else messages %}
{{- '<|im_start|>' }}
{%- for message in rest %}
    {%- if message.role == 'user' %}
        {%- set is_last = loop.last or (loop.index == loop.length - 1) %}
        {{- '[INST] ' + (system + '\n\n' if system and is_last else '') + message.content + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + '<|im_end|>' }}
    {%- else %}
        {{- raise_exception('only user and assistant') }}
    {%- endif %}
{%- endfor %}
"""


def chat_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A small BPE with ChatML's tokens, and ``<think>`` and its end as tokens that are not special."""
    text = Path(json.__file__).read_text()
    tokenizer = train_byte_level_bpe([text], 400, controls=("<|im_start|>", "<|im_end|>"))
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    tokenizer.chat_template = template
    return tokenizer


def turns(*contents: str, system: str | None = None) -> dict[str, Any]:
    """A conversation in which user and assistant speak in turn."""
    said = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + said}


CONVERSATIONS = [
    turns("What does dump do?", "It writes an object as JSON to a file."),
    turns("And dumps?", "It returns a text.", "Thank you!", "You are welcome.", system="Be brief."),
    turns("Say <|im_end|> and <think>", "I may not.", "Why?", "It is a <|im_end|> control token.\nA line more.\n"),
    turns("Think.", "<think>\nHm.\n</think>\n\nDone.", "Again.", "<think>\nWell.\n</think>\n\nDone again."),
    turns("  spaces around \n", " an answer with spaces ", "a question without an answer"),
    turns("\u00e9\u4e2d\U0001f600 \ud7ff?", "\u4e2d\u6587 na\u00efve \U0001f600."),
]
