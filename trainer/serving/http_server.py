"""uvicorn with bounds on headers, and an end that loses nothing that it has accepted."""

import asyncio
import contextlib
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sharding.ranks.errors import UserError
from trainer.serving.guard import Guard

_MAX_HEADER_BYTES = 64 * 2**10
_IDLE_GRACE_S = 1.0
_KEEP_ALIVE_S = 75
_BACKLOG = 2048
_POLL_S = 0.02


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections whose headers are too long, or take too long."""

    header_timeout_s = 10.0

    def connection_made(self, transport: Any) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
        self._is_in_body = False
        self._num_header_bytes = 0
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if not self._is_in_body:
            self._expect_headers()
            self._num_header_bytes += len(data)
        super().data_received(data)
        # A body may have come along: only what is still waited for counts.
        if self._deadline is not None and self._num_header_bytes > _MAX_HEADER_BYTES:
            self._give_up()

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._forget_deadline()
        self._is_in_body = True
        self._num_header_bytes = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """See httptools."""
        self._is_in_body = False
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._forget_deadline()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.header_timeout_s, self._give_up)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._forget_deadline()
        # An answer that is on its way to the same connection is still sent.
        self.shutdown()


class LosslessServer(uvicorn.Server):
    """Ends on SIGTERM or SIGINT once all that was accepted is answered; a second one ends at once."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, on_end: Callable[[], None]) -> None:
        """Bind to a socket that is bound, and to what is told when the end begins."""
        super().__init__(config)
        self._listener = listener
        self._on_end = on_end

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn, which would end the process by the signal in the end, as if nothing had been finished."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn; before, what has connected is let in, and every connection is told to close by its next answer.

        A connection that was closed while its sender was writing would lose a request that it believes to be sent.
        """
        self._on_end()
        await self._accept_the_last()
        self.server_state.default_headers.append((b"connection", b"close"))
        for connection in list(self.server_state.connections):
            assert isinstance(connection, BoundedProtocol), "there is no other"
            if connection.cycle is not None and not connection.cycle.response_complete:
                # An answer that has begun knows older headers.
                connection.shutdown()
        grace_until = asyncio.get_running_loop().time() + _IDLE_GRACE_S
        while self.server_state.connections and asyncio.get_running_loop().time() < grace_until and not self.force_exit:
            await asyncio.sleep(_POLL_S)
        await super().shutdown(sockets)

    async def _accept_the_last(self) -> None:
        """Stop listening, but take in those that the system has connected already."""
        last = self._listener.dup()
        last.setblocking(False)
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        # Of more, the rest has come after the signal.
        for _ in range(_BACKLOG):
            try:
                connection, _ = last.accept()
            except OSError:
                # There is none any more, or this process may have no more.
                break
            connection.setblocking(False)
            with contextlib.suppress(OSError):
                await loop.connect_accepted_socket(self._new_protocol, connection)
        last.close()

    def _new_protocol(self) -> Any:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet, so that a port in use is found before anything is loaded.

    Raises:
        UserError: there is no such address here, or another program has the port.
    """
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise UserError(
            f"--host {host} --port {port} cannot be listened on ({error.strerror or error}); choose another, or --port "
            "0 for one that is free."
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a browser of this machine finds it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve_app(app: Guard, listener: socket.socket, timeout_s: float) -> None:
    """Answer until SIGTERM or SIGINT, and then what is left.

    Args:
        app: what answers.
        listener: a bound socket.
        timeout_s: how long headers may take; an answer takes a few times as long at most.
    """
    _allow_many_files()

    class Protocol(BoundedProtocol):
        header_timeout_s = timeout_s

    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        # What a proxy says of whom it asks for is of no use here, and anybody may say it.
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        # A body, its wait for an answer, and somebody who reads it slowly; each has bounds of its own before.
        timeout_graceful_shutdown=round(3 * timeout_s) + 5,
        backlog=_BACKLOG,
    )
    server = LosslessServer(config, listener, app.end)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(server.serve(sockets=[listener]))


def _allow_many_files() -> None:
    """Have as many connections as the system lets this process have, which is more than it gives unasked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
