"""What schemathesis makes of the server's own description finds no answer that is a failure of the server."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from tests.trainer.serving.serving_support import Server, digits_folder, serving, table_folder


@pytest.fixture(scope="module", params=["table", pytest.param("digits", marks=pytest.mark.slow)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    make = {"digits": digits_folder, "table": table_folder}[request.param]
    with serving(make(tmp_path_factory.mktemp("fuzz") / request.param)) as server:
        yield server


def test_no_request_makes_the_server_fail(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: list[int] = []
    num_operations = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        num_operations += 1
        # Without parameters or a body there is nothing that could be wrong.
        modes = (
            list(schemathesis.GenerationMode) if operation.method == "post" else [schemathesis.GenerationMode.POSITIVE]
        )
        for mode in modes:
            _try(operation.as_strategy(generation_mode=mode), statuses, 30 if operation.method == "post" else 2)
    assert num_operations == 5
    assert len(statuses) > 40
    assert [status for status in statuses if status >= 500] == []
    assert {200, 422} <= set(statuses)


def _try(strategy: Any, statuses: list[int], num_examples: int) -> None:
    from hypothesis import given

    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(case=strategy)
    def ask(case: Any) -> None:
        statuses.append(case.call().status_code)

    ask()
