"""Conversations as tokens: a chat template writes them, and what the assistant says in them is the target."""

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sharding.ranks.errors import UserError
from trainer.data.conversations import ASSISTANT, TOOLS, Conversation, in_all_texts
from trainer.data.tokenizer import HIDDEN, control_encoder, load_tokenizer, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OWN_TEMPLATES = ("chatml", "plain")
"""Templates that come with this package, by name."""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
"""Control tokens that ``chatml`` needs."""

# Another noncharacter: within a control token's name it makes a text of it that no template takes for the token.
_MARK = "\U0010fffe"
_REPLACEMENT = "\ufffd"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_QUESTION, _ANSWER = "What is the question?", "This is the answer."
Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation, or a part of one, as a template writes it.

    Attributes:
        text: with ``HIDDEN`` before each control token.
        spans: where the targets are, in characters.
    """

    text: str
    spans: list[Span]


class ChatTemplate:
    """A tokenizer's chat template.

    What is said is text, a control token's name in it too: only the template writes control tokens. Targets are what
    ``{% generation %}`` encloses where the template has that, else all that it writes of an assistant's turn behind
    its generation prompt, the end of the turn included.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", name: str) -> None:
        """Try the template on a question and an answer.

        Args:
            tokenizer: has the template.
            name: what to call the template.

        Raises:
            UserError: it cannot be rendered, or does not show what the assistant says or where that ends.
        """
        self._tokenizer = tokenizer
        self._name = name
        templates = tokenizer.chat_template
        self._source = "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)
        self._has_generation = _GENERATION.search(self._source) is not None
        special = {token for token in special_tokens(tokenizer) if len(token) > 1} - {tokenizer.unk_token}
        # Such as <think>, which an assistant may say and a user may not.
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        own = {token for token in added - special if len(token) > 1 and token.strip() and token in self._source}
        self._encoder = control_encoder(tokenizer, special | own)
        self._control = _any_of(special | own)
        self._special = _any_of(special)
        self._written = re.compile(f"{_MARK}|{self._control.pattern}")
        self.end_of_turn_id = self._try()

    @property
    def writes_dates(self) -> bool:
        """Whether what it writes depends on the day."""
        return "strftime_now" in self._source

    def render(self, conversation: Conversation, place: str) -> list[RenderedConversation]:
        """A conversation as the template writes it; none where nothing of it is a target.

        Where the template writes an earlier turn otherwise once another follows, as some do that leave out reasoning or
        move the system's message, the conversation is divided: each part is what the model will see when it answers.

        Args:
            conversation: see ``trainer.data.conversations``.
            place: where it is, to speak of.

        Raises:
            UserError: the template refuses it, or leaves out what is in it.
        """
        tools = conversation.get(TOOLS)
        messages: list[Message] = conversation["messages"]
        if tools and TOOLS not in self._source:
            raise self._refusal(f"writes no tools, which {place} has")
        if any(message.get("tool_calls") for message in messages) and "tool_calls" not in self._source:
            raise self._refusal(f"writes no tool_calls, which {place} has")
        messages = [self._as_said(message) for message in messages]
        tools = in_all_texts(tools, lambda text: _marked(text, self._control))
        if self._has_generation:
            whole, spans = self._render(messages, tools, place)
            parts = [(whole, spans)] if spans else []
        else:
            parts = self._by_prefixes(messages, tools, place)
        return [self._with_controls(text, spans) for text, spans in parts]

    def encode(self, rendered: Sequence[RenderedConversation]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids of each, int64 [tokens], and which of them are targets, bool [tokens]."""
        encodings = self._encoder.encode_batch([one.text for one in rendered], add_special_tokens=False)
        return [
            (np.array(encoding.ids, dtype=np.int64), _targets(encoding.offsets, one.spans))
            for encoding, one in zip(encodings, rendered, strict=True)
        ]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids after which the assistant's next turn begins.

        Raises:
            UserError: the template refuses the messages.
        """
        text, _ = self._render([self._as_said(message) for message in messages], None, "the prompt", asks=True)
        ids: list[int] = self._encoder.encode(self._with_controls(text, []).text, add_special_tokens=False).ids
        return ids

    def _try(self) -> int | None:
        """The control token that ends an assistant's turn; None where there is none."""
        messages = [{"role": "user", "content": _QUESTION}, {"role": ASSISTANT, "content": _ANSWER}]
        text, spans = self._render(messages, None, "a question and its answer")
        if not self._has_generation:
            parts = self._by_prefixes(messages, None, "a question and its answer")
            text, spans = parts[0]
        begin = text.find(_ANSWER)
        if begin < 0:
            raise self._refusal("writes nothing of what the assistant says")
        end = begin + len(_ANSWER)
        if not any(start <= begin and end <= stop for start, stop in spans):
            raise self._refusal("has {% generation %} elsewhere than around what the assistant says")
        control = re.compile(rf"\s*({self._control.pattern})").match(text, end)
        if control is None:
            return None
        if not any(start <= begin and control.end() <= stop for start, stop in spans):
            raise self._refusal(
                f"has {{% endgeneration %}} before {control[1]}, so that a model would never learn to end its turn"
            )
        token_id: int = self._tokenizer.convert_tokens_to_ids(control[1])
        return token_id

    def _by_prefixes(self, messages: list[Message], tools: Any, place: str) -> list[tuple[str, list[Span]]]:
        """Texts and targets by what the template writes of the beginnings of a conversation."""
        parts: list[tuple[str, list[Span]]] = []
        for index, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            prompt, _ = self._render(messages[:index], tools, place, asks=True)
            whole, _ = self._render(messages[: index + 1], tools, place)
            if not whole.startswith(prompt):
                raise self._refusal(
                    f"writes message {index} of {place} otherwise than its generation prompt begins it, and has no "
                    "{% generation %}"
                )
            span = (len(prompt), len(whole))
            if parts and prompt.startswith(parts[-1][0]):
                parts[-1] = (whole, [*parts[-1][1], span])
            else:
                parts.append((whole, [span]))
        return parts

    def _render(self, messages: list[Message], tools: Any, place: str, *, asks: bool = False) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        has_spans = self._has_generation and not asks
        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self._tokenizer.get_chat_template(None, tools),
                return_assistant_tokens_mask=has_spans,
                add_generation_prompt=asks,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:  # noqa: BLE001 - a template raises what it likes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise self._refusal(f"cannot write {place} ({reason})") from None
        return texts[0], spans[0] if has_spans else []

    def _as_said(self, message: Message) -> Message:
        """A message in whose texts no control token's name is taken for the token."""
        control = self._special if message["role"] == ASSISTANT else self._control
        return {
            name: value if name == "role" else in_all_texts(value, lambda text: _marked(text, control))
            for name, value in message.items()
        }

    def _with_controls(self, text: str, spans: list[Span]) -> RenderedConversation:
        """Tell the control tokens that the template has written from those that were said."""
        pieces, places, shifts = [], [], [0]
        end = 0
        for found in self._written.finditer(text):
            is_mark = found[0] == _MARK
            pieces += [text[end : found.start()], "" if is_mark else HIDDEN + found[0]]
            places.append(found.start())
            shifts.append(shifts[-1] + (-1 if is_mark else 1))
            end = found.end()

        def moved(bound: int) -> int:
            return bound + shifts[bisect.bisect_left(places, bound)]

        spans = [(moved(start), moved(stop)) for start, stop in spans]
        return RenderedConversation("".join([*pieces, text[end:]]), spans)

    def _refusal(self, reason: str) -> UserError:
        return UserError(
            f"{self._name} {reason}; name a file with another one, or {' or '.join(OWN_TEMPLATES)}, as "
            "data.chat_template."
        )


def load_chat_template(tokenizer: "PreTrainedTokenizerFast", setting: str | None, name: str) -> ChatTemplate:
    """The chat template of a tokenizer, which gets another one if that is set.

    Args:
        tokenizer: keeps the template, so that it is saved along with it.
        setting: ``data.chat_template``.
        name: what to call the tokenizer.

    Raises:
        UserError: there is none, the file cannot be read, or see ChatTemplate.
    """
    if setting is None:
        if not tokenizer.chat_template:
            raise UserError(
                f"data.tokenizer={name} has no chat template, by which conversations become text; set "
                f"data.chat_template to {', '.join(OWN_TEMPLATES)} or a file."
            )
        return ChatTemplate(tokenizer, f"the chat template of data.tokenizer={name}")
    tokenizer.chat_template = template_text(setting)
    template = ChatTemplate(tokenizer, f"data.chat_template={setting}")
    if setting == "chatml" and template.end_of_turn_id is None:
        raise UserError(
            f"data.chat_template=chatml writes <|im_start|> and <|im_end|>, which data.tokenizer={name} has no tokens "
            "for, so that no turn would have an end; set data.chat_template=plain, or add the tokens to the tokenizer."
        )
    return template


def end_of_turn_ids(folder: Path) -> set[int]:
    """Tokens that end what a model says: the end of text, and that of a turn by the chat template.

    Args:
        folder: of the tokenizer.
    """
    tokenizer = load_tokenizer(str(folder), packs=False)
    end_of_turn = ChatTemplate(tokenizer, "the chat template").end_of_turn_id if tokenizer.chat_template else None
    return {token for token in (tokenizer.eos_token_id, end_of_turn) if token is not None}


def template_text(setting: str) -> str:
    """The Jinja source that ``data.chat_template`` names.

    Raises:
        UserError: the file cannot be read.
    """
    path = Path(__file__).parent / "chat_templates" / f"{setting}.jinja" if setting in OWN_TEMPLATES else Path(setting)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(
            f"data.chat_template={setting} cannot be read ({reason}); name a file with a Jinja template, or "
            f"{' or '.join(OWN_TEMPLATES)}."
        ) from None


def _any_of(names: set[str]) -> re.Pattern[str]:
    """Any of the names, of two that begin alike the longer one."""
    return re.compile("|".join(map(re.escape, sorted(names, key=lambda name: (-len(name), name)))) or "(?!)")


def _marked(text: str, control: re.Pattern[str]) -> str:
    """A text with a mark within each control token's name."""
    text = text.replace(_MARK, _REPLACEMENT).replace(HIDDEN, _REPLACEMENT)
    # Names may overlap.
    while (marked := control.sub(lambda found: f"{found[0][0]}{_MARK}{found[0][1:]}", text)) != text:
        text = marked
    return text


def _targets(offsets: list[tuple[int, int]], spans: list[Span]) -> np.ndarray:
    """Tokens that have characters in one of the spans, bool [tokens]."""
    starts, stops = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    # One that stands for no character, as some tokenizers put before a word, belongs to what follows it.
    stops = np.maximum(stops, starts + 1)
    is_target = np.zeros(len(offsets), dtype=bool)
    for start, stop in spans:
        is_target |= (starts < stop) & (stops > start)
    return is_target
