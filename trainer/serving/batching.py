"""Requests that arrive at about the same time are computed together, in one thread beside the one that reads them."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from trainer.serving.options import RequestFault

_logger = logging.getLogger(__name__)

BUSY_RETRY_S = 1


@dataclass
class _Waiting:
    """A request in the queue."""

    request: Any
    num_rows: int
    outcome: "asyncio.Future[Any]"


class Batcher:
    """A bounded queue, and the task that empties it batch by batch.

    The first request waits at most so long for others; while a batch is computed the next one fills up, so that under
    load nobody waits for the clock.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Any]], Sequence[Any]],
        *,
        max_batch: int,
        max_wait_s: float,
        max_queue: int,
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Nothing is started yet.

        Args:
            compute: for each of some requests its answer, or the RequestFault that it has.
            max_batch: rows that are computed together.
            max_wait_s: how long a batch waits for more.
            max_queue: rows that may wait.
            on_batch: is told the rows of each batch.
        """
        self._compute = compute
        self._max_batch = max_batch
        self._max_wait_s = max_wait_s
        self._max_queue = max_queue
        self._on_batch = on_batch
        self._queue: deque[_Waiting] = deque()
        self._num_rows = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._task: asyncio.Task[None] | None = None
        self._is_ending = False

    @property
    def num_rows(self) -> int:
        """Rows that wait."""
        return self._num_rows

    def start(self) -> None:
        """Begin to empty the queue, in the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._empty())

    async def end(self) -> None:
        """Answer all that waits, and end."""
        self._is_ending = True
        self._arrived.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def ask(self, request: Any, num_rows: int, timeout_s: float) -> Any:
        """The answer to a request.

        Args:
            request: what ``compute`` takes.
            num_rows: its rows.
            timeout_s: how long it may take.

        Raises:
            RequestFault: too much waits already, it took too long, or the request cannot be answered.
        """
        if self._num_rows + num_rows > self._max_queue or self._is_ending:
            raise RequestFault(503, "too many rows wait for an answer already; ask again", BUSY_RETRY_S)
        waiting = _Waiting(request, num_rows, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._num_rows += num_rows
        self._arrived.set()
        try:
            outcome = await asyncio.wait_for(waiting.outcome, timeout_s)
        except TimeoutError:
            raise RequestFault(503, f"there was no answer within {timeout_s:g} s; ask again", BUSY_RETRY_S) from None
        if isinstance(outcome, RequestFault):
            raise outcome
        return outcome

    async def _empty(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := await self._next_batch(loop):
            self._on_batch(sum(one.num_rows for one in batch))
            requests = [one.request for one in batch]
            try:
                outcomes = await loop.run_in_executor(self._thread, self._compute, requests)
            except Exception as error:
                # Of the model or of ours; it is logged here once, and each of these requests is told.
                _logger.exception("a batch of %d requests failed", len(batch))
                outcomes = [RequestFault(500, f"the model failed ({type(error).__name__})")] * len(batch)
            for one, outcome in zip(batch, outcomes, strict=True):
                # Whoever asked may have given up.
                if not one.outcome.done():
                    one.outcome.set_result(outcome)

    async def _next_batch(self, loop: asyncio.AbstractEventLoop) -> list[_Waiting]:
        """Requests to compute together; none at the end."""
        batch: list[_Waiting] = []
        num_rows = 0
        deadline: float | None = None
        while True:
            while self._queue and num_rows + self._queue[0].num_rows <= self._max_batch:
                one = self._queue.popleft()
                self._num_rows -= one.num_rows
                if not one.outcome.done():
                    batch.append(one)
                    num_rows += one.num_rows
            if self._queue or num_rows == self._max_batch or (self._is_ending and (batch or not self._queue)):
                return batch
            if batch and deadline is None:
                deadline = loop.time() + self._max_wait_s
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), None if deadline is None else deadline - loop.time())
            except TimeoutError:
                return batch
