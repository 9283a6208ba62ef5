"""Storage that is away for now, told from input that is wrong: the first may be tried again, the second may not.

Imports no torch.
"""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sharding.ranks.errors import RunFailure, UserError

# Not EIO: a disk says that of a block that is gone for good.
_ERRNOS = frozenset(
    {errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ENOTCONN, errno.EREMOTEIO}
    | {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EBUSY}
)
_STATUSES = (408, 429)
# Of botocore, aiohttp, http.client and fsspec, none of which is imported for this.
_INTERRUPTED = frozenset(
    {"HTTPClientError", "IncompleteRead", "IncompleteReadError", "ResponseStreamingError", "FSTimeoutError"}
    | {"ClientPayloadError", "ServerDisconnectedError", "ServerTimeoutError", "ClientOSError"}
)
# These may as well mean a wrong address.
_NOT_CONNECTED = frozenset({"ConnectionError", "ConnectionRefusedError", "ClientConnectorError", "gaierror"})


class StorageOutage(RunFailure):
    """A storage does not answer, or not as it should; the same request may succeed later."""


def is_outage(error: BaseException, *, was_reached: bool = True) -> bool:
    """Whether an error tells that a storage is away, and nothing of what it was asked for.

    Args:
        error: as it was raised; what it was raised from counts too.
        was_reached: whether the storage has answered before, so that its address is right.
    """
    for link in _chain(error):
        status = _status(link)
        if status is not None:
            return status >= 500 or status in _STATUSES
        names = {kind.__name__ for kind in type(link).__mro__}
        if not was_reached and names & _NOT_CONNECTED and not isinstance(link, ConnectionResetError):
            return False
        if isinstance(link, TimeoutError) or names & (_INTERRUPTED | _NOT_CONNECTED):
            return True
        if isinstance(link, OSError) and link.errno in _ERRNOS:
            return True
    return False


def blames_storage(error: OSError) -> bool:
    """Whether what kept a file from being written is no fault of whoever named its folder."""
    return error.errno == errno.EIO or is_outage(error)


def cannot_be_written(what: str, folder: Path, error: OSError) -> UserError | StorageOutage:
    """What to raise where a local folder cannot be written.

    Args:
        what: what to call it.
        folder: the folder.
        error: why.
    """
    if blames_storage(error):
        return StorageOutage(f"{what} {folder} cannot be written for now: {error.strerror}; run again to continue.")
    return UserError(f"{what} {folder} cannot be written: {error.strerror}; choose another output_dir.")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The status of the HTTP answer that an error of a store's library is about, if it is about one."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        found = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    else:
        found = [getattr(error, "status", None), getattr(response, "status_code", None), getattr(error, "code", None)]
    return next((status for status in found if isinstance(status, int)), None)
