"""Ranks train what was frozen, and all the same."""

from pathlib import Path
from typing import Any

import pytest

from sharding.errors import UserError
from sharding.process_group import Ranks
from tests.support import run_on_ranks, write_config
from trainer.config import load_config
from trainer.frozen_config import all_differences, frozen_differences
from trainer.rank import _begin_attempt, _Progress, _refuse_other_config
from trainer.run_folder import RunFolder
from trainer.validation import World

pytestmark = pytest.mark.timeout(120)


def test_what_differs_and_what_of_it_is_frozen(tmp_path: Path, values: dict[str, Any]) -> None:
    config = write_config(tmp_path / "tiny.yaml", values)
    one, other = load_config(config), load_config(config, ["optimizer.lr=0.5", "steps=7", "data.skip_samples=[[3,4]]"])
    assert frozen_differences(one, other) == ["optimizer.lr: frozen 0.01, now 0.5"]
    assert all_differences(one, other) == [
        "data.skip_samples: [] and [[3, 4]]",
        "optimizer.lr: 0.01 and 0.5",
        "steps: 6 and 7",
    ]
    assert all_differences(one, load_config(config)) == []


def test_a_rank_that_was_given_other_settings_than_its_attempt_is_refused(
    tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_config(tmp_path / "tiny.yaml", values)
    config = load_config(file)
    folder = RunFolder.of(config)
    assert folder.begin_attempt(config, World(1, has_gpu=False), []) == 1
    assert folder.begin_attempt(load_config(file, ["steps=7"]), World(1, has_gpu=False), []) == 2
    monkeypatch.setenv("SHARDLINE_ATTEMPT", "2")
    monkeypatch.setenv("SHARDLINE_LEASE", "of the launcher")
    frozen = load_config(folder.attempt_config_file(2))
    assert _begin_attempt(frozen, World(1, has_gpu=False), folder, _Progress()) == 2
    with pytest.raises(UserError, match=r"attempt 2 of .* other settings .*\(steps: 7 and 6\)"):
        _begin_attempt(config, World(1, has_gpu=False), folder, _Progress())


def _read_and_agree(ranks: Ranks, file: Path, overrides_of_rank_1: list[str], expected: str) -> None:
    config = load_config(file, overrides_of_rank_1 if ranks.rank == 1 else [])
    if not expected:
        _refuse_other_config(config, ranks)
        return
    with pytest.raises(UserError, match=expected):
        _refuse_other_config(config, ranks)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [([], ""), (["optimizer.lr=0.5"], r"rank 0 and rank 1 .*\(optimizer.lr: 0.01 and 0.5\)")],
)
def test_ranks_that_read_different_files_all_say_so(
    tmp_path: Path, values: dict[str, Any], overrides: list[str], expected: str
) -> None:
    file = write_config(tmp_path / "tiny.yaml", values)
    run_on_ranks(_read_and_agree, 2, file, overrides, expected)
