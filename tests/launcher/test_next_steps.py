"""What a run that has ended well names: its report, and commands that fit what it has learnt."""

from pathlib import Path
from typing import Any

import pytest

from launcher.next_steps import next_steps
from trainer.config import parse_config
from trainer.run_folder.folder import RunFolder

_LLAMA = {"architecture": "llama"}
_CHATS = {"source": "jsonl", "paths": ["chats.jsonl"], "format": "messages"}


@pytest.mark.parametrize(
    ("sections", "commands"),
    [
        ({"model": _LLAMA}, ["generate {run} --prompt TEXT", "export {run} --to DIR"]),
        (
            {"model": {"pretrained": "x", "trust_remote_code": True}},
            ["generate {run} --prompt TEXT --trust-remote-code", "export {run} --to DIR --trust-remote-code"],
        ),
        (
            {"model": {"architecture": "bert"}, "task": {"name": "masked-lm"}},
            ["evaluate {run}", "export {run} --to DIR"],
        ),
        (
            {"model": _LLAMA, "data": _CHATS},
            ["generate {run} --chat --prompt TEXT", "export {run} --to DIR"],
        ),
        (
            {
                "model": _LLAMA,
                "data": {
                    "mixture": [
                        {"name": "a", "source": "jsonl", "paths": ["a.jsonl"], "format": "messages", "weight": 1.0}
                    ]
                },
            },
            ["generate {run} --chat --prompt TEXT", "export {run} --to DIR"],
        ),
        (
            {
                "model": _LLAMA,
                "steps": None,
                "stages": [
                    {"name": "texts", "steps": 1},
                    {"name": "chats", "steps": 2, "data": _CHATS},
                ],
            },
            ["generate {run} --chat --prompt TEXT", "export {run} --to DIR"],
        ),
        (
            {"model": {"pretrained": "x", "lora": {"rank": 4}}},
            ["generate {run} --prompt TEXT", "export {run} --adapter --to DIR"],
        ),
        ({"model": _LLAMA, "task": {"name": "own:Task"}}, ["evaluate {run} --task own:Task"]),
        (
            {"model": {"factory": "own:make"}, "task": {"name": "own:Task"}},
            ["evaluate {run} --task own:Task --factory own:make"],
        ),
    ],
)
def test_commands_fit_the_task(tmp_path: Path, sections: dict[str, Any], commands: list[str]) -> None:
    config = parse_config({"steps": 3, "output_dir": str(tmp_path), "name": "a", **sections}, "test", has_rules=False)
    folder = RunFolder(tmp_path / "a")
    lines = next_steps(config, folder, 0)
    assert lines[0].startswith("next      shardline ")
    assert [line[10:] for line in lines] == [f"shardline {command.format(run=folder.path)}" for command in commands]


def test_the_report_is_named_where_there_is_one(tmp_path: Path) -> None:
    config = parse_config({"steps": 3, "output_dir": str(tmp_path), "model": _LLAMA}, "test", has_rules=False)
    folder = RunFolder(tmp_path / "with space")
    folder.path.mkdir()
    assert next_steps(config, folder, 75) == []
    folder.report_file.touch()
    assert next_steps(config, folder, 75) == [f"report    {folder.report_file}"]
    assert next_steps(config, folder, 1) == []
    assert f"'{folder.path}'" in next_steps(config, folder, 0)[1]
