"""`~` and `$VARIABLE` in paths: replaced wherever a path is read, and as they are in what a run freezes."""

from pathlib import Path
from typing import Any

import pytest

from sharding.ranks.errors import UserError
from tests.support import write_config
from trainer.commands.arguments import expanded
from trainer.config import RunConfig, config_to_yaml, load_config
from trainer.config.expansion import PATH_SETTINGS, expand
from trainer.data.files import find_files


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("UNSET_FOLDER", raising=False)


def test_the_run_goes_where_a_shell_would_put_it(tmp_path: Path, config_file: Path) -> None:
    assert load_config(config_file, ["output_dir=~/x"]).run_dir == tmp_path / "home" / "x" / "tiny"
    assert load_config(config_file, ["output_dir=$SCRATCH/x"]).run_dir == tmp_path / "scratch" / "x" / "tiny"
    assert load_config(config_file, ["output_dir='${SCRATCH}/x'"]).run_dir == tmp_path / "scratch" / "x" / "tiny"


def test_every_path_is_expanded(tmp_path: Path, values: dict[str, Any]) -> None:
    def put(key: str, value: Any) -> None:
        *parents, leaf = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value

    values["model"] = {"factory": "own:make"}
    for key in PATH_SETTINGS:
        in_list = key.startswith("stages.") or key in ("data.mixture.paths", "evaluation.sets.paths")
        if not in_list and key not in ("model.pretrained", "data.folder", "data.chat_template"):
            put(key, ["$SCRATCH/x", "~/y"] if key == "data.paths" else "$SCRATCH/x")
    values["task"]["name"] = "own:Task"
    values["data"] = {key: value for key, value in values["data"].items() if key != "validation_fraction"}
    values["data"]["format"] = "rows"
    values["parallel"] |= {"backend": "deepspeed", "strategy": "zero3", "offload_optimizer": "nvme"}
    config = load_config(write_config(tmp_path / "all.yaml", values))
    written = config.model_dump_json()
    assert "$" not in written
    assert "~" not in written
    assert config.data.paths == (f"{tmp_path}/scratch/x", f"{tmp_path}/home/y")
    assert config.model.folder == config.task.folder == f"{tmp_path}/scratch/x"
    values["data"] = {"source": "factory", "factory": "own:samples", "folder": "$SCRATCH/x"}
    assert load_config(write_config(tmp_path / "own.yaml", values)).data.folder == f"{tmp_path}/scratch/x"
    assert config.checkpoint.from_ == config.parallel.nvme_path == config.checkpoint.storage == f"{tmp_path}/scratch/x"


def test_a_chat_template_is_found_where_a_shell_would(config_file: Path, tmp_path: Path) -> None:
    settings = ["data.source=jsonl", "data.format=messages", "data.packing=whole", "data.document_mask=true"]
    config = load_config(config_file, [*settings, "data.chat_template=$SCRATCH/x"])
    assert config.data.chat_template == f"{tmp_path}/scratch/x"


def test_a_mixtures_files_and_a_pretrained_model(tmp_path: Path, values: dict[str, Any]) -> None:
    kept = {key: value for key, value in values["data"].items() if key not in ("source", "paths")}
    source = {"name": "a", "source": "text", "paths": ["~/docs"], "weight": 1.0}
    values["data"] = kept | {"mixture": [source, source | {"name": "b", "paths": ["$SCRATCH/docs"]}]}
    values["model"] = {"pretrained": "~/model"}
    config = load_config(write_config(tmp_path / "mixture.yaml", values))
    assert [s.paths for s in config.data.mixture] == [(f"{tmp_path}/home/docs",), (f"{tmp_path}/scratch/docs",)]
    assert config.model.pretrained == f"{tmp_path}/home/model"
    del values["steps"]
    values["stages"] = [{"name": "one", "steps": 1}, {"name": "two", "steps": 1, "data": {"mixture": [source]}}]
    staged = load_config(write_config(tmp_path / "staged.yaml", values))
    assert staged.stages[1].data.mixture[0].paths == (f"{tmp_path}/home/docs",)


def test_a_copy_reads_the_same_elsewhere(tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "a$b.txt").write_text("text")
    config = load_config(config_file, ["output_dir=~/x", "data.paths=[$SCRATCH/a$$b.txt]"])
    copy = tmp_path / "config.yaml"
    copy.write_text(config_to_yaml(config))
    monkeypatch.setenv("HOME", "/home/somebody-else")
    monkeypatch.delenv("SCRATCH")
    again = load_config(copy)
    assert again == config
    assert find_files(again.data).files == [tmp_path / "scratch" / "a$b.txt"]
    assert RunConfig.model_validate(again.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("output_dir=$UNSET_FOLDER/x", r"output_dir=\$UNSET_FOLDER/x: the variable UNSET_FOLDER is not set or empty"),
        ("data.paths=[a, '${UNSET_FOLDER}/b']", r"data.paths=\$\{UNSET_FOLDER\}/b: the variable UNSET_FOLDER is not"),
        (
            "output_dir=~nobody-of-that-name/x",
            "output_dir=~nobody-of-that-name/x: there is no user nobody-of-that-name",
        ),
    ],
)
def test_what_is_not_there_is_named(config_file: Path, override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_config(config_file, [override])


def test_what_a_shell_leaves_alone_stays() -> None:
    for text in ("runs", "gpt2", "a/~b", "s3://bucket/x", "a$ b", "cost$", "data/*.txt", "/a/~/b"):
        assert expand(text, "key") == text


def test_arguments_of_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert expanded("~/run") == f"{tmp_path}/home/run"
    assert expanded([Path("$SCRATCH/run"), Path("b")]) == [tmp_path / "scratch" / "run", Path("b")]
    assert expanded(None) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a$UNSET_FOLDER").mkdir()
    # What is there is meant.
    assert expanded("a$UNSET_FOLDER") == "a$UNSET_FOLDER"
