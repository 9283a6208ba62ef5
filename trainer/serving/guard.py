"""What every request passes before it is looked at: its key, its size, its time; nothing of it is logged."""

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Collection
from typing import Any

from trainer.serving.batching import BUSY_RETRY_S
from trainer.serving.metrics import ServerMetrics
from trainer.serving.options import RequestFault, ServeOptions

_LINGER_S = 1.0
_LINGER_BODIES = 4

Headers = dict[bytes, bytes]


class Guard:
    """ASGI middleware: reads each body whole, within its bounds, and hands it on."""

    def __init__(
        self,
        app: Any,
        options: ServeOptions,
        metrics: ServerMetrics,
        *,
        open_paths: Collection[str],
        known_paths: Collection[str],
    ) -> None:
        """Wrap an application.

        Args:
            app: of ASGI.
            options: the bounds.
            metrics: are counted here.
            open_paths: what needs no key.
            known_paths: what is counted under its own name.
        """
        self._app = app
        self._options = options
        self._metrics = metrics
        self._open_paths = open_paths
        self._known_paths = known_paths
        self._key_sha256 = None if options.api_key is None else _sha256(options.api_key.encode())
        self._num_active = 0
        self.is_ending = False

    def end(self) -> None:
        """Take note that the server ends: what is on its way is answered, but nothing more should come."""
        self.is_ending = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._known_paths else "other"
        began_at = time.perf_counter()
        status = 0

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._num_active += 1
        self._metrics.active_requests.set(self._num_active)
        try:
            await self._admit(scope, receive, counted)
        finally:
            self._num_active -= 1
            self._metrics.active_requests.set(self._num_active)
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - began_at)

    async def _admit(self, scope: Any, receive: Any, send: Any) -> None:
        headers: Headers = dict(scope["headers"])
        if self._key_sha256 is not None and scope["path"] not in self._open_paths and not self._has_key(headers):
            fault = RequestFault(401, "this server needs a key; send it as Authorization: Bearer KEY")
            await self._refuse(fault, headers, receive, send)
            return
        if not _has_body(headers):
            await self._app(scope, receive, send)
            return
        try:
            if self._num_active > self._options.max_queue:
                raise RequestFault(503, "too many requests at a time; ask again", BUSY_RETRY_S)
            body = await self._read(headers, receive)
        except RequestFault as fault:
            await self._refuse(fault, headers, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, headers: Headers, receive: Any) -> bytes | None:
        """The body; None where its sender is gone.

        Raises:
            RequestFault: it is too large, or takes too long.
        """
        limit = self._options.max_body_bytes
        declared = headers.get(b"content-length")
        if declared is not None and int(declared) > limit:
            raise RequestFault(413, f"the body has {int(declared):,} bytes, and at most {limit:,} are read")
        body = bytearray()
        try:
            async with asyncio.timeout(self._options.timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise RequestFault(413, f"the body has more than {limit:,} bytes, which are the most")
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise RequestFault(408, f"the body was not whole within {self._options.timeout_s:g} s") from None

    async def _refuse(self, fault: RequestFault, headers: Headers, receive: Any, send: Any) -> None:
        """Answer a request whose body is not whole, and close.

        Whoever still sends a body when a socket is closed with unread bytes in it may never see the answer, so some of
        it is read and thrown away.
        """
        content = json.dumps({"detail": fault.detail}).encode()
        sent = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        sent.append((b"connection", b"close"))
        if fault.status == 401:
            sent.append((b"www-authenticate", b"Bearer"))
        if fault.retry_after_s is not None:
            sent.append((b"retry-after", str(fault.retry_after_s).encode()))
        await send({"type": "http.response.start", "status": fault.status, "headers": sent})
        has_body = _has_body(headers)
        await send({"type": "http.response.body", "body": content, "more_body": has_body})
        if not has_body:
            return
        num_left = _LINGER_BODIES * self._options.max_body_bytes
        try:
            async with asyncio.timeout(_LINGER_S):
                while num_left > 0:
                    message = await receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        break
                    num_left -= len(message.get("body", b""))
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        key = given.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        assert self._key_sha256 is not None, "the caller has seen it"
        # Of hashes, so that not even the length tells in the time it takes.
        return hmac.compare_digest(_sha256(key), self._key_sha256)


def _sha256(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _has_body(headers: Headers) -> bool:
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


def _replay(body: bytes, receive: Any) -> Any:
    """A ``receive`` that gives the whole body, and then what the first one gives."""
    is_given = False

    async def replayed() -> Any:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
