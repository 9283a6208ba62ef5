"""JSON files that carry the SHA-256 of their own contents, so that any change of a byte is found."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

SUM_KEY = "contents_sha256"
_HEAD = re.compile(rb'\{"' + SUM_KEY.encode() + rb'": "([0-9a-f]{64})", ')


def dump_checked(values: Mapping[str, Any]) -> bytes:
    """A JSON object with its checksum as the first key; the checksum is of the bytes that follow it."""
    body = json.dumps(values).removeprefix("{").encode()
    return f'{{"{SUM_KEY}": "{hashlib.sha256(body).hexdigest()}", '.encode() + body


def load_checked(raw: bytes) -> dict[str, Any]:
    """The values of ``dump_checked``; nothing is parsed before the checksum is compared.

    Raises:
        ValueError: there is no checksum, or it is not that of the contents.
    """
    head = _HEAD.match(raw)
    if head is None:
        raise ValueError("it does not begin with its checksum")
    body = raw[head.end() :]
    if hashlib.sha256(body).hexdigest() != head[1].decode():
        raise ValueError("its contents do not have the SHA-256 that it says")
    values = json.loads(b"{" + body)
    assert isinstance(values, dict), "what dump_checked wrote"
    return values
