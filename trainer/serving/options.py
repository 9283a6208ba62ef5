"""What a server of a model is told, and what it may say no to."""

import os
from dataclasses import dataclass

from sharding.ranks.errors import UserError


@dataclass(frozen=True)
class ServeOptions:
    """Limits of a server.

    Attributes:
        host: address to listen on.
        port: port; 0 takes a free one.
        max_batch: rows that are computed together, and the most of one request.
        max_wait_ms: how long a batch waits for further rows, in milliseconds.
        max_queue: rows that may wait; also how many requests are read or answered at a time.
        max_body_bytes: the largest body of a request.
        num_threads: threads that compute one batch.
        api_key: what every request must bring; None lets all in.
        timeout_s: how long headers may take to arrive, then a body, and then its answer, each.
    """

    host: str
    port: int
    max_batch: int
    max_wait_ms: float
    max_queue: int
    max_body_bytes: int
    num_threads: int
    api_key: str | None
    timeout_s: float = 10.0


class RequestFault(Exception):
    """A request cannot be answered, for a reason that its sender is told.

    Attributes:
        status: HTTP status.
        detail: one sentence.
        retry_after_s: when it may be worth asking again; None where it is not.
    """

    def __init__(self, status: int, detail: str, retry_after_s: int | None = None) -> None:
        """See the attributes."""
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.retry_after_s = retry_after_s

    def at_row(self, index: int) -> "RequestFault":
        """The same fault, of a row."""
        return RequestFault(self.status, f"row {index}: {self.detail}", self.retry_after_s)


def api_key_of(variable: str | None) -> str | None:
    """The key that an environment variable holds; None where none is named.

    Raises:
        UserError: it is not set, or empty, or no header could carry it.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key.strip() or not key.isascii() or not key.isprintable() or key != key.strip():
        what = "is not set or empty" if not key.strip() else "has spaces around it or characters that no header carries"
        raise UserError(
            f"--api-key-env {variable}: this variable {what}; put a key of printable ASCII into it, or leave the "
            "option out to let everybody in."
        )
    return key
