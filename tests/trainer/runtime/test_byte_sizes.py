"""Numbers of bytes for people."""

import pytest

from trainer.runtime.byte_sizes import size_text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536.5, "1.5 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (350 * 2**20, "350.0 MiB"),
        (2**30, "1.0 GiB"),
        (1.26 * 2**40, "1.3 TiB"),
        (5000 * 2**40, "5,000.0 TiB"),
    ],
)
def test_the_largest_unit_of_which_there_is_one(num_bytes: float, text: str) -> None:
    assert size_text(num_bytes) == text
