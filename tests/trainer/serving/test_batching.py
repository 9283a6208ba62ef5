"""Dynamic batching: what is computed together, and that each request has its own answer."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from trainer.serving.batching import Batcher
from trainer.serving.options import RequestFault


class Doubler:
    """Doubles numbers, once it may; a negative one is a fault, and 13 breaks the batch."""

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, requests: Sequence[int]) -> list[Any]:
        self.may_go.wait(10)
        self.batches.append(list(requests))
        if 13 in requests:
            raise RuntimeError("broken")
        return [RequestFault(422, "negative") if number < 0 else 2 * number for number in requests]


def batcher_of(compute: Doubler, **settings: Any) -> Batcher:
    return Batcher(compute, **{"max_batch": 4, "max_wait_s": 0.01, "max_queue": 100, **settings})


async def until_taken(batcher: Batcher) -> None:
    while batcher.num_rows:
        await asyncio.sleep(0.001)


def test_requests_that_wait_are_computed_together_and_each_has_its_answer() -> None:
    async def scenario() -> None:
        compute = Doubler()
        batcher = batcher_of(compute)
        batcher.start()
        first = asyncio.create_task(batcher.ask(1, 1, 10.0))
        await asyncio.sleep(0.05)
        others = [asyncio.create_task(batcher.ask(number, 1, 10.0)) for number in range(2, 11)]
        await asyncio.sleep(0.01)
        compute.may_go.set()
        assert await first == 2
        assert await asyncio.gather(*others) == [2 * number for number in range(2, 11)]
        assert compute.batches == [[1], [2, 3, 4, 5], [6, 7, 8, 9], [10]]
        await batcher.end()

    asyncio.run(scenario())


def test_rows_are_counted_and_a_request_is_never_divided() -> None:
    async def scenario() -> None:
        compute = Doubler()
        batcher = batcher_of(compute)
        asked = [
            asyncio.create_task(batcher.ask(number, rows, 10.0)) for number, rows in ((1, 3), (2, 2), (3, 2), (4, 4))
        ]
        await asyncio.sleep(0)
        compute.may_go.set()
        batcher.start()
        await asyncio.gather(*asked)
        assert compute.batches == [[1], [2, 3], [4]]
        await batcher.end()

    asyncio.run(scenario())


def test_a_fault_is_its_requests_alone_and_a_broken_batch_does_not_end_the_others() -> None:
    async def scenario() -> None:
        compute = Doubler()
        compute.may_go.set()
        batcher = batcher_of(compute)
        batcher.start()
        right, wrong = await asyncio.gather(batcher.ask(5, 1, 10.0), batcher.ask(-1, 1, 10.0), return_exceptions=True)
        assert right == 10
        assert isinstance(wrong, RequestFault)
        assert wrong.status == 422
        with pytest.raises(RequestFault, match="the model failed") as broken:
            await batcher.ask(13, 1, 10.0)
        assert broken.value.status == 500
        assert await batcher.ask(6, 1, 10.0) == 12
        await batcher.end()

    asyncio.run(scenario())


def test_a_full_queue_and_a_long_wait_are_503_and_what_was_given_up_is_not_computed() -> None:
    async def scenario() -> None:
        compute = Doubler()
        batcher = batcher_of(compute, max_queue=3)
        batcher.start()
        first = asyncio.create_task(batcher.ask(1, 1, 10.0))
        await asyncio.sleep(0)
        await until_taken(batcher)
        await asyncio.sleep(0.05)
        given_up = asyncio.create_task(batcher.ask(2, 1, 0.02))
        patient = asyncio.create_task(batcher.ask(3, 2, 10.0))
        await asyncio.sleep(0)
        with pytest.raises(RequestFault, match="too many rows") as refused:
            await batcher.ask(4, 1, 10.0)
        assert (refused.value.status, refused.value.retry_after_s) == (503, 1)
        with pytest.raises(RequestFault, match=r"no answer within 0.02 s") as late:
            await given_up
        assert (late.value.status, late.value.retry_after_s) == (503, 1)
        compute.may_go.set()
        assert (await first, await patient) == (2, 6)
        assert [2] not in compute.batches
        assert compute.batches == [[1], [3]]
        assert batcher.num_rows == 0
        await batcher.end()

    asyncio.run(scenario())


def test_the_end_answers_all_that_waits() -> None:
    async def scenario() -> None:
        compute = Doubler()
        batcher = batcher_of(compute)
        batcher.start()
        asked = [asyncio.create_task(batcher.ask(number, 1, 10.0)) for number in range(20, 30)]
        await asyncio.sleep(0.05)
        ending = asyncio.create_task(batcher.end())
        await asyncio.sleep(0)
        with pytest.raises(RequestFault):
            await batcher.ask(1, 1, 10.0)
        compute.may_go.set()
        assert await asyncio.gather(*asked) == [2 * number for number in range(20, 30)]
        await ending

    asyncio.run(scenario())
