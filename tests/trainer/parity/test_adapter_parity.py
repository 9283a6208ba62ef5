"""Adapters (LoRA) and frozen parameters beside one plain process: only the right ones move, and they do."""

from pathlib import Path
from typing import Any

import pytest

from trainer.config import parse_config
from trainer.parity.cases import ParityCase
from trainer.parity.comparison import ParityRow, parity_cases, run_parity


def _restricted(group_sizes: list[int], *trained: Any) -> list[ParityCase]:
    return [case for case in parity_cases(group_sizes, (), trained=trained) if case.trained != "all"]


def _assert_all_pass(rows: list[ParityRow], num_cases: int) -> None:
    assert len(rows) == num_cases
    assert [row for row in rows if not row.passed] == []


@pytest.mark.timeout(600)
def test_every_engine_trains_adapters_as_one_plain_process_does(values: dict[str, Any], tmp_path: Path) -> None:
    cases = _restricted([1, 2, 3], "adapters")
    assert len({(case.backend, case.strategy, case.num_ranks) for case in cases}) == 23
    _assert_all_pass(run_parity(parse_config(values, "test"), cases, tmp_path), len(cases))
