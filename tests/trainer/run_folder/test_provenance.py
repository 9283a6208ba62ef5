"""Where a run comes from."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT
from trainer.config import load_config
from trainer.config.rules import World
from trainer.run_folder.provenance import code_revision, collect_provenance


@pytest.mark.parametrize(
    ("argument", "written"),
    [
        ("WANDB_API_KEY=abc", "WANDB_API_KEY=***"),
        ("HF_TOKEN=hf_abc def", "HF_TOKEN=***"),
        ("--token=x", "--token=***"),
        ("tracking.apiKey=x", "tracking.apiKey=***"),
        ("password=x", "password=***"),
        ("data.tokenizer=gpt2", "data.tokenizer=gpt2"),
        ("data.shard_tokens=1000", "data.shard_tokens=1000"),
        ("model.config.num_key_value_heads=2", "model.config.num_key_value_heads=2"),
    ],
)
def test_secrets_are_redacted_and_settings_are_not(config_file: Path, argument: str, written: str) -> None:
    provenance = collect_provenance(load_config(config_file), World(2, has_gpu=False), ["shardline", argument])
    assert provenance["argv"] == ["shardline", written]


def test_the_machine_and_the_packages(config_file: Path) -> None:
    provenance = collect_provenance(load_config(config_file), World(2, has_gpu=False), [])
    assert provenance["hardware"]["usable_cores"] == len(os.sched_getaffinity(0))
    assert provenance["hardware"]["cpu"]
    assert provenance["packages"]["pydantic"]
    assert provenance["threads_per_rank"] >= 1


def test_cores_are_divided_among_the_ranks_of_a_node(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    num_cores = len(os.sched_getaffinity(0))
    for world, num_local in ((World(64, has_gpu=False, num_local_ranks=1), 1), (World(64, has_gpu=False), 64)):
        provenance = collect_provenance(load_config(config_file), world, [])
        assert provenance["threads_per_rank"] == max(1, num_cores // num_local)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_revision_is_this_checkouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert code_revision()["git_revision"] == head.stdout.strip()


def test_a_machine_without_git_gives_the_distributions_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert set(code_revision()) == {"distribution_version"}
