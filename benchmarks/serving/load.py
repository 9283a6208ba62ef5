"""``python -m benchmarks.serving.load``: clients that ask again as soon as they are answered, and check every answer.

Reads its plan as JSON from standard input, a line ``signal`` when the server has been asked to end, and writes what
came of it as JSON.
"""

import asyncio
import json
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_TOLERANCE = 1e-4
_TAIL_S = 4.0
_RETRY_S = 0.05
_SLOW_BYTES_S = 0.05


@dataclass
class Counts:
    """What came of requests."""

    num_right: int = 0
    num_wrong: int = 0
    num_lost: int = 0
    num_busy: int = 0
    num_refused: int = 0
    times_s: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Counts, and quantiles of the time of right answers."""
        counts = {name: value for name, value in vars(self).items() if name != "times_s"}
        if not self.times_s:
            return counts | {"p50_s": None, "p99_s": None}
        p50, p99 = np.quantile(self.times_s, [0.5, 0.99])
        return counts | {"p50_s": float(p50), "p99_s": float(p99)}


class Load:
    """Closed-loop clients of one server."""

    def __init__(self, plan: dict[str, Any]) -> None:
        """Take a plan: port, connections, slow clients, rows, what is right, and for how long."""
        self._plan = plan
        self._requests = [_request(row) for row in plan["rows"]]
        self._before, self._after, self._slow = Counts(), Counts(), Counts()
        self._signal_at: float | None = None
        self._end_at = float("inf")

    async def run(self) -> dict[str, Any]:
        """Ask until the tail after the signal is over; returns what came of it."""
        began_at = time.perf_counter()
        clients = [asyncio.create_task(self._client(index)) for index in range(self._plan["connections"])]
        clients += [asyncio.create_task(self._slow_client(index)) for index in range(self._plan["slow"])]
        await asyncio.to_thread(sys.stdin.readline)
        self._signal_at = time.perf_counter()
        self._end_at = self._signal_at + _TAIL_S
        await asyncio.gather(*clients)
        return {
            "wall_s": self._signal_at - began_at,
            "before": self._before.summary(),
            "after": self._after.summary(),
            "slow": self._slow.summary(),
        }

    async def _client(self, index: int) -> None:
        number, connection = index, None
        while time.perf_counter() < self._end_at:
            if connection is None:
                try:
                    connection = await asyncio.open_connection("127.0.0.1", self._plan["port"])
                except OSError:
                    self._counts(None).num_refused += 1
                    await asyncio.sleep(_RETRY_S)
                    continue
            which = number % len(self._requests)
            number += self._plan["connections"]
            asked_at = time.perf_counter()
            is_open = await self._ask(connection, self._requests[which], which, asked_at)
            if not is_open:
                connection[1].close()
                connection = None
        if connection is not None:
            connection[1].close()

    async def _ask(self, connection: Any, request: bytes, which: int, asked_at: float) -> bool:
        """One request and its answer; returns whether the connection stays open."""
        reader, writer = connection
        try:
            writer.write(request)
            status, body, is_open = await _answer(reader)
        except (OSError, asyncio.IncompleteReadError):
            self._counts(asked_at).num_lost += 1
            return False
        took_s = time.perf_counter() - asked_at
        counts = self._counts(asked_at + took_s)
        if status == 503:
            counts.num_busy += 1
        elif status == 200 and _is_right(body, self._plan["expected"][which]):
            counts.num_right += 1
            counts.times_s.append(took_s)
        else:
            counts.num_wrong += 1
        return is_open

    async def _slow_client(self, index: int) -> None:
        """Sends a request byte by byte, until it is answered."""
        which = index % len(self._requests)
        while self._signal_at is None:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._plan["port"])
            except OSError:
                self._slow.num_refused += 1
                await asyncio.sleep(_RETRY_S)
                continue
            answer = asyncio.create_task(_answer(reader))
            for byte in self._requests[which]:
                writer.write(bytes([byte]))
                if (await asyncio.wait([answer], timeout=_SLOW_BYTES_S))[0]:
                    break
            try:
                status, body, _ = await answer
            except (OSError, asyncio.IncompleteReadError):
                self._slow.num_lost += 1
            else:
                is_right = status == 200 and _is_right(body, self._plan["expected"][which])
                self._slow.num_right += is_right
                self._slow.num_busy += status in (408, 503)
                self._slow.num_wrong += not is_right and status not in (408, 503)
            writer.close()

    def _counts(self, at: float | None) -> Counts:
        is_after = self._signal_at is not None and (at is None or at >= self._signal_at)
        return self._after if is_after else self._before


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").lower().split("\r\n")
    headers = dict(line.partition(": ")[::2] for line in lines[1:] if line)
    body = await reader.readexactly(int(headers["content-length"]))
    return int(lines[0].split()[1]), body, headers.get("connection") != "close"


def _request(row: list[int]) -> bytes:
    body = json.dumps({"rows": [{"pixels": row}]}).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _is_right(body: bytes, expected: dict[str, Any]) -> bool:
    (prediction,) = json.loads(body)["predictions"]
    found = prediction["probabilities"]
    return prediction["class"] == expected["class"] and all(
        abs(found[name] - value) < _TOLERANCE for name, value in expected["probabilities"].items()
    )


def is_listening(port: int) -> bool:
    """Whether a port is answered."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    load = Load(json.loads(sys.stdin.readline()))
    print(json.dumps(asyncio.run(load.run())), flush=True)
