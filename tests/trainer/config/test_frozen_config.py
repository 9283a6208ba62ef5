"""Ranks train what was frozen, and all the same."""

from pathlib import Path
from typing import Any

import pytest

from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.support import run_on_ranks, write_config, write_empty_checkpoint
from trainer.attempt import begin_attempt, check_continuation
from trainer.config import config_to_yaml, load_config
from trainer.config.frozen_config import Change, all_differences, frozen_differences
from trainer.config.rules import World
from trainer.config.yaml_files import dump_yaml
from trainer.ending import Progress
from trainer.rank import _begin_attempt, _refuse_other_config
from trainer.run_folder.folder import RunFolder

pytestmark = pytest.mark.timeout(120)


def test_what_differs_and_what_of_it_is_frozen(tmp_path: Path, values: dict[str, Any]) -> None:
    config = write_config(tmp_path / "tiny.yaml", values)
    one, other = load_config(config), load_config(config, ["optimizer.lr=0.5", "steps=7", "data.skip_samples=[[3,4]]"])
    assert frozen_differences(one, other) == [Change("optimizer.lr", 0.01, 0.5)]
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
    assert begin_attempt(folder, config, World(1, has_gpu=False), []) == 1
    assert begin_attempt(folder, load_config(file, ["steps=7"]), World(1, has_gpu=False), []) == 2
    monkeypatch.setenv("SHARDLINE_ATTEMPT", "2")
    monkeypatch.setenv("SHARDLINE_LEASE", "of the launcher")
    frozen = load_config(folder.attempt_config_file(2))
    assert _begin_attempt(frozen, World(1, has_gpu=False), folder, Progress()) == 2
    with pytest.raises(UserError, match=r"attempt 2 of .* other settings .*\(steps: 7 and 6\)"):
        _begin_attempt(config, World(1, has_gpu=False), folder, Progress())


def _read_and_agree(ranks: Ranks, file: Path) -> None:
    same, other = load_config(file), load_config(file, ["optimizer.lr=0.5"] if ranks.rank == 1 else [])
    _refuse_other_config(same, ["one corpus"], ranks)
    with pytest.raises(UserError, match=r"rank 0 and rank 1 .*\(optimizer.lr: 0.01 and 0.5\)"):
        _refuse_other_config(other, ["one corpus"], ranks)
    with pytest.raises(UserError, match=r"rank 0 and rank 1 have prepared different corpora from data.source=text"):
        _refuse_other_config(same, ["one corpus", f"a set of rank {ranks.rank}"], ranks)


def test_ranks_that_read_different_files_or_corpora_all_say_so(tmp_path: Path, values: dict[str, Any]) -> None:
    run_on_ranks(_read_and_agree, 2, write_config(tmp_path / "tiny.yaml", values))


def test_a_frozen_configuration_reads_back_what_looks_like_a_number(tmp_path: Path, values: dict[str, Any]) -> None:
    tracking = {"wandb": {"mode": "disabled", "tags": ["1e-3", "2E5", "07", "null"]}}
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_yaml(values | {"tracking": tracking}))
    config = load_config(file)
    assert config.tracking.wandb.tags == ("1e-3", "2E5", "07", "null")
    copy = tmp_path / "copy.yaml"
    copy.write_text(config_to_yaml(config))
    assert load_config(copy) == config


def test_what_an_earlier_release_has_frozen_can_be_read_whatever_rules_have_come(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    file = write_config(tmp_path / "tiny.yaml", values)
    folder = RunFolder.of(load_config(file))
    begin_attempt(folder, load_config(file), World(1, has_gpu=False), [])
    frozen = folder.config_file.read_text()
    old = frozen.replace("validation_fraction: 0.2", "validation_fraction: 0.0").replace(
        "mode: default", "mode: max-autotune"
    )
    assert old != frozen
    folder.config_file.write_text(old)
    write_empty_checkpoint(folder.checkpoint_path(3), 3)
    with pytest.raises(UserError, match="replays CUDA graphs"):
        load_config(folder.config_file)
    assert folder.frozen_config().data.validation_fraction == 0.0
    assert folder.newest_config().compile.mode == "max-autotune"
    # With what the new rules ask for, it goes on.
    wanted = load_config(file, ["data.validation_fraction=0", "evaluation.every_steps=0"])
    check_continuation(RunFolder.of(wanted), wanted)
