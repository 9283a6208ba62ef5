"""A storage that is away is told from input that is wrong."""

import errno
import os
import socket
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, ConnectionClosedError, EndpointConnectionError, ReadTimeoutError
from s3fs.errors import translate_boto_error

from sharding.ranks.errors import RunFailure, UserError
from trainer.files.outages import cannot_be_written, is_outage


def _answer(status: int, code: str) -> Exception:
    response = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, "PutObject")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "is_away"),
    [
        (_answer(503, "SlowDown"), True),
        (_answer(500, "InternalError"), True),
        (_answer(429, "TooManyRequests"), True),
        (_answer(403, "AccessDenied"), False),
        (_answer(400, "ExpiredToken"), False),
        (_answer(404, "NoSuchBucket"), False),
        (ConnectionClosedError(endpoint_url="http://store"), True),
        (ReadTimeoutError(endpoint_url="http://store"), True),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), True),
        (TimeoutError(), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (ValueError("no such protocol"), False),
    ],
)
def test_what_may_be_tried_again(error: Exception, is_away: bool) -> None:
    assert is_outage(error) is is_away
    assert is_outage(error, was_reached=False) is is_away
    if isinstance(error, ClientError):
        # As s3fs hands it on.
        assert is_outage(translate_boto_error(error)) is is_away


@pytest.mark.parametrize(
    "error",
    [
        EndpointConnectionError(endpoint_url="http://store", error="refused"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    ],
)
def test_an_address_that_has_never_answered_may_be_wrong(error: Exception) -> None:
    assert is_outage(error)
    assert not is_outage(error, was_reached=False)


def test_a_folder_that_is_away_is_a_failure(tmp_path: Path) -> None:
    for number, kind in ((errno.EACCES, UserError), (errno.ESTALE, RunFailure), (errno.EIO, RunFailure)):
        error = cannot_be_written("run folder", tmp_path, OSError(number, os.strerror(number)))
        assert isinstance(error, kind)
        assert os.strerror(number) in str(error)
