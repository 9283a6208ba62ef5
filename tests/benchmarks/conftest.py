"""Benchmarks' ranks are clones of a process that has imported everything."""

from collections.abc import Iterator

import pytest

from tests.support import from_zygote


@pytest.fixture(autouse=True)
def ranks_from_zygote() -> Iterator[None]:
    """Where a benchmark starts ranks from the test's own process."""
    with from_zygote():
        yield
