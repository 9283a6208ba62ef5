"""Conversations: rows of messages as they are read, checked, and kept as JSON. Imports no torch."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sharding.ranks.errors import UserError
from trainer.config.data import SourceConfig
from trainer.data.row_files import json_rows, open_parquet, parquet_rows

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool", "function", "ipython")
"""Roles of messages. Another name would be trained on as nobody's turn, and say nothing."""

TOOLS = "tools"
"""Column of the functions that may be called in a conversation."""

_SYSTEM, _RESULTS = ("system", "developer"), ("tool", "function", "ipython")

Conversation = dict[str, Any]
"""``messages``, each with ``role`` and ``content``, and perhaps ``tools``."""


def read_conversations(path: Path, config: SourceConfig) -> Iterator[tuple[str, int]]:
    """The conversations of a file of JSON lines or Parquet as JSON, and the number of each row.

    Raises:
        UserError: a row has no conversation, or one that is not as it should be.
        Exception: of the library that reads the format, where the file is corrupt.
    """
    if config.source == "jsonl":
        rows = json_rows(path)
    else:
        table = open_parquet(path)
        if table is None:
            return
        names = set(table.schema_arrow.names) & {config.messages_field, TOOLS}
        if config.messages_field not in names:
            raise _no_column(config, str(path), list(table.schema_arrow.names))
        # Structs have all fields in all rows, and null stands for those that a row was written without.
        rows = ((place, _without_null(row)) for place, row in parquet_rows(path, sorted(names)))
    for number, (place, row) in enumerate(rows):
        yield conversation_of(row, config, place), number


def hub_conversation(row: dict[str, Any], config: SourceConfig, place: str) -> str:
    """The conversation of a row of the hub as JSON; see ``conversation_of``."""
    if config.messages_field not in row:
        raise _no_column(config, place, list(row))
    return conversation_of(_without_null(row), config, place)


def conversation_of(row: dict[str, Any], config: SourceConfig, place: str) -> str:
    """A row's conversation as JSON.

    Args:
        row: its columns.
        config: says which of them holds the messages.
        place: where the row is, to speak of.

    Raises:
        UserError: there is none, or it is not as it should be.
    """
    column = config.messages_field
    if column not in row:
        raise _no_column(config, place, list(row))

    def refuse(reason: str) -> UserError:
        return UserError(f"data.messages_field={column}: {place} {reason}; mend or remove it.")

    messages = row[column]
    if not isinstance(messages, list):
        raise refuse(f"is {_kind(messages)} and no list of messages")
    if not messages:
        raise refuse("has an empty conversation")
    kept = [_message(message, index, refuse) for index, message in enumerate(messages)]
    _check_order([message["role"] for message in kept], refuse)
    conversation: Conversation = {"messages": kept}
    if row.get(TOOLS):
        conversation[TOOLS] = _tools(row[TOOLS], refuse)
    return json.dumps(conversation, ensure_ascii=False)


def in_all_texts(value: Any, change: Callable[[str], str]) -> Any:
    """What JSON holds with each text in it changed; names of fields stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: in_all_texts(inner, change) for name, inner in value.items()}
    return [in_all_texts(inner, change) for inner in value] if isinstance(value, list) else value


def said(conversation: str) -> str:
    """What is said in a conversation, without who says it: what a tokenizer may be trained on."""
    messages = json.loads(conversation)["messages"]
    return "\n".join(message["content"] for message in messages if message.get("content"))


def _message(message: Any, index: int, refuse: Callable[[str], UserError]) -> dict[str, Any]:
    where = f"message {index}"
    if not isinstance(message, dict):
        raise refuse(f"has a {where} that is {_kind(message)} and no object with role and content")
    present = {name: value for name, value in message.items() if value is not None}
    role = present.get("role")
    if role not in ROLES:
        found = "no role" if role is None else f"the role {role!r}"
        raise refuse(f"has a {where} with {found}, none of {', '.join(ROLES)}")
    content = present.get("content")
    if content is None and present.get("tool_calls"):
        # Some templates write it without asking whether it is there.
        return present | {"content": ""}
    if not isinstance(content, str):
        raise refuse(f"has a {where} whose content is {_kind(content)} and no text")
    return present


def _check_order(roles: list[str], refuse: Callable[[str], UserError]) -> None:
    """Assert what every template means: system, then user and assistant in turn, results of calls after the assistant.

    Raises:
        UserError: it is otherwise.
    """
    before = "nothing"
    for index, role in enumerate(roles):
        follows = {
            **dict.fromkeys(_SYSTEM, ("nothing", *_SYSTEM)),
            "user": ("nothing", *_SYSTEM, ASSISTANT),
            ASSISTANT: ("user", *_RESULTS),
            **dict.fromkeys(_RESULTS, (ASSISTANT, *_RESULTS)),
        }[role]
        if before not in follows:
            raise refuse(f"has roles out of order: message {index} is of {role} and follows {before}")
        before = role


def _tools(value: Any, refuse: Callable[[str], UserError]) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise refuse(f"has tools that are no JSON ({error})") from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise refuse("has tools that are no list of descriptions")
    return value


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_null(inner) for name, inner in value.items() if inner is not None}
    return [_without_null(inner) for inner in value] if isinstance(value, list) else value


def _no_column(config: SourceConfig, place: str, columns: list[str]) -> UserError:
    return UserError(
        f"data.messages_field={config.messages_field} is not a column of {place}, which has {', '.join(columns)}; name "
        "the one that holds conversations."
    )


def _kind(value: Any) -> str:
    names = {type(None): "null", str: "a text", list: "a list", dict: "an object", bool: "a truth value"}
    return names.get(type(value), "a number")
