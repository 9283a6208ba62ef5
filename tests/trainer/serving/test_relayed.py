"""Answers of the process behind, passed on as they come; and connections at the end."""

import asyncio
import json
import os
import resource
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import uvicorn

from trainer.serving.http_server import LosslessServer
from trainer.serving.language_model import _Relayed


def test_events_stay_whole_whatever_a_text_has_inside() -> None:
    """A line separator is a character of JSON, and ends no line of a stream."""
    folder = Path("/models/tiny")
    texts = ["a\u2028b", "\x85", "\u2029 and \u00e9", "the end"]
    inner = [json.dumps({"model": f"{folder}@main", "text": text}, ensure_ascii=False) for text in texts]
    whole = "".join(f"data: {event}\n\n" for event in inner).encode()

    async def relayed(num_bytes: int) -> bytes:
        async def parts() -> AsyncIterator[bytes]:
            for begin in range(0, len(whole), num_bytes):
                yield whole[begin : begin + num_bytes]

        passed = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=parts())
        return b"".join([part async for part in _Relayed(passed, "tiny", folder, asyncio.Semaphore())._parts()])

    for num_bytes in (1, 7, len(whole)):
        events = asyncio.run(relayed(num_bytes)).decode().split("\n\n")
        assert events.pop() == ""
        found = [json.loads(event.removeprefix("data: ")) for event in events]
        assert found == [{"model": "tiny", "text": text} for text in texts], num_bytes


def test_the_end_comes_where_no_connection_can_be_taken_in() -> None:
    with socket.socket() as listener, socket.socket() as client:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.connect(listener.getsockname())
        server = LosslessServer(uvicorn.Config("nothing:app"), listener, lambda: None)
        server.servers = []
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

        async def accept() -> None:
            free = os.dup(client.fileno())
            os.close(free)
            # One more for the copy of the listener, and none for the connection.
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
            try:
                await server._accept_the_last()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

        asyncio.run(accept())
