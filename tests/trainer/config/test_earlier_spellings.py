"""What earlier releases called otherwise is read, means what it meant, and equals the present spelling."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharding.config import ParallelConfig
from sharding.ranks.errors import UserError
from trainer.config import config_to_yaml, load_config, load_frozen_config
from trainer.config.earlier_spellings import overrides_with_present_spelling
from trainer.config.frozen_config import all_differences
from trainer.config.yaml_files import dump_yaml, parse_yaml
from trainer.report.attempts import read_attempts


@pytest.fixture
def written(tmp_path: Path, values: dict[str, Any]) -> Callable[..., Path]:
    """Writes a configuration with these settings of ``parallel``."""

    def write(parallel: dict[str, Any], name: str = "own.yaml") -> Path:
        path = tmp_path / name
        path.write_text(dump_yaml(values | {"parallel": parallel}))
        return path

    return write


@pytest.mark.parametrize(
    ("parallel", "overrides", "backend"),
    [
        ({"engine": "bucketed"}, [], "bucketed"),
        ({"engine": "bucketed", "backend": "torch"}, [], "bucketed"),
        ({"engine": "bucketed", "backend": "bucketed"}, [], "bucketed"),
        ({"engine": "fully_shard"}, [], "torch"),
        ({"engine": "fully_shard", "backend": "deepspeed"}, [], "deepspeed"),
        ({"engine": "fully_shard", "backend": "accelerate", "strategy": "ddp"}, [], "accelerate"),
        ({}, ["parallel.engine=bucketed"], "bucketed"),
        ({"backend": "torch"}, ["parallel.engine=bucketed"], "bucketed"),
        ({"engine": "bucketed"}, ["parallel.engine=fully_shard"], "torch"),
        # What names the backend now replaces all that the file says of it.
        ({"engine": "bucketed"}, ["parallel.backend=torch"], "torch"),
        ({"engine": "bucketed"}, ["parallel.backend=deepspeed"], "deepspeed"),
        ({"engine": "fully_shard"}, ["parallel.backend=bucketed"], "bucketed"),
        ({"engine": "bucketed"}, ["parallel.backend=torch", "parallel.engine=bucketed"], "bucketed"),
    ],
)
def test_an_engine_of_earlier_releases_is_a_backend(
    written: Callable[..., Path], parallel: dict[str, Any], overrides: list[str], backend: str
) -> None:
    config = load_config(written(parallel), overrides)
    assert config.parallel.backend == backend
    present = {key: value for key, value in parallel.items() if key != "engine"} | {"backend": backend}
    assert all_differences(config, load_config(written(present))) == []
    # Nobody reads it in what is frozen from now on.
    assert "engine" not in parse_yaml(config_to_yaml(config))["parallel"]


@pytest.mark.parametrize(
    ("parallel", "overrides", "message"),
    [
        (
            {"engine": "bucketed", "backend": "deepspeed"},
            [],
            "parallel.engine=bucketed, which is the earlier spelling of parallel.backend=bucketed, contradicts "
            "parallel.backend=deepspeed; remove parallel.engine.",
        ),
        ({"backend": "accelerate"}, ["parallel.engine=bucketed"], "contradicts parallel.backend=accelerate"),
        ({}, ["parallel.engine=bucketed", "parallel.backend=deepspeed"], "contradicts parallel.backend=deepspeed"),
        ({"engine": "fully_shard", "backend": "bucketed"}, [], "contradicts parallel.backend=bucketed"),
        ({"engine": "fsdp"}, [], "parallel.engine=fsdp is no engine of earlier releases"),
        ({"engine": None}, [], "parallel.engine=None is no engine of earlier releases"),
        ({"engine": "bucketed", "backend": ["torch"]}, [], "contradicts parallel.backend=['torch']"),
        ({"engine": "bucketed", "strategy": "ddp"}, [], "parallel.backend=bucketed cannot do parallel.strategy=ddp"),
    ],
)
def test_what_contradicts_itself_is_refused(
    written: Callable[..., Path], parallel: dict[str, Any], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        load_config(written(parallel), overrides)
    assert message in str(refused.value)


def test_a_users_own_file_is_told_once(
    written: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written({"engine": "bucketed"})
    for _ in range(2):
        load_config(path)
    sentence = "parallel.engine=bucketed is read as parallel.backend=bucketed; write that."
    assert capsys.readouterr().err == f"note: {path}: {sentence}\n"
    monkeypatch.setenv("RANK", "1")
    load_config(written({"engine": "bucketed"}, "other.yaml"))
    assert capsys.readouterr().err == ""


def test_a_frozen_run_is_taken_without_a_word_and_equals_the_present_spelling(
    written: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = ParallelConfig().model_dump(mode="json")
    frozen = written(everything | {"engine": "bucketed"}, "config.yaml")
    present = load_config(written({"backend": "bucketed"}))
    assert all_differences(load_frozen_config(frozen), present) == []
    assert all_differences(load_config(frozen), present) == []
    assert capsys.readouterr().err == ""
    # Nor does a report show that the second attempt has changed anything.
    (tmp_path / "config.attempt-2.yaml").write_text(config_to_yaml(present))
    (tmp_path / "logs" / "attempt-2").mkdir(parents=True)
    first, second = (attempt.config for attempt in read_attempts(tmp_path))
    assert first["parallel.backend"] == second["parallel.backend"] == "bucketed"
    assert "parallel.engine" not in first


def test_changes_to_a_run_are_spelt_anew() -> None:
    changes = ["parallel.engine=bucketed", "steps=3", "parallel.engine=fully_shard"]
    assert overrides_with_present_spelling(changes) == ["parallel.backend=bucketed", "steps=3"]
