"""A run's folder: attempts, what may not change between them, and how they end."""

import json
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharding.ranks.errors import UserError
from tests.support import write_empty_checkpoint
from trainer.attempt import begin_attempt, check_continuation, finished
from trainer.config import RunConfig, load_config
from trainer.config.rules import World
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.lease import Lease

WORLD = World(num_ranks=2, has_gpu=False)


@pytest.fixture
def load(config_file: Path) -> Callable[..., RunConfig]:
    """The tiny run's configuration with overrides."""
    return lambda *overrides: load_config(config_file, overrides)


def begin(config: RunConfig, argv: tuple[str, ...] = ("shardline", "run")) -> tuple[RunFolder, int]:
    folder = RunFolder(config.run_dir)
    return folder, begin_attempt(folder, config, WORLD, list(argv))


def add_checkpoint(folder: RunFolder, step: int) -> Path:
    return write_empty_checkpoint(folder.checkpoint_path(step), step)


def test_first_attempt_freezes_configuration_and_provenance(load: Callable[..., RunConfig]) -> None:
    config = load()
    folder, attempt = begin(config, ("shardline", "run", "x.yaml", "tracking.api_key=hunter2", "data.tokenizer=gpt2"))
    assert attempt == 1
    assert folder.frozen_config() == config
    provenance = json.loads((folder.path / "provenance.json").read_text())
    assert provenance["argv"][-2:] == ["tracking.api_key=***", "data.tokenizer=gpt2"]
    assert provenance["num_ranks"] == 2
    # It holds uncommitted code.
    assert (folder.path / "provenance.json").stat().st_mode & 0o777 == 0o600
    assert provenance["packages"]["torch"]
    assert folder.log_dir(1).is_dir()


def test_later_attempts_stand_beside_the_first(load: Callable[..., RunConfig]) -> None:
    folder, _ = begin(load())
    add_checkpoint(folder, 3)
    folder.request_stop("enough")
    folder.write_outcome("stopped", 75, 3, "stopped on request")
    _, attempt = begin(load("steps=9"))
    assert attempt == 2
    assert folder.frozen_config().steps == 6
    assert load_config(folder.path / "config.attempt-2.yaml").steps == 9
    assert (folder.path / "provenance.attempt-2.json").exists()
    assert not folder.stop_file.exists()
    assert folder.read_outcome() is None


def test_a_run_whose_logs_were_cleared_away_freezes_its_next_attempt_all_the_same(
    load: Callable[..., RunConfig],
) -> None:
    folder, _ = begin(load())
    add_checkpoint(folder, 3)
    shutil.rmtree(folder.path / "logs")
    for number, steps in ((2, 9), (3, 11)):
        _, attempt = begin(load(f"steps={steps}"))
        assert attempt == number
        assert load_config(folder.attempt_config_file(attempt)).num_steps == steps
        shutil.rmtree(folder.path / "logs")
    assert folder.frozen_config() == load()


def test_files_have_the_users_own_permissions(load: Callable[..., RunConfig]) -> None:
    previous = os.umask(0o027)
    try:
        folder, _ = begin(load())
        folder.request_stop("enough")
    finally:
        os.umask(previous)
    for path in (folder.config_file, folder.stop_file):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o750


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("optimizer.lr=0.5", "optimizer.lr: frozen 0.01, now 0.5"),
        ("seed=8", "seed: frozen 7, now 8"),
        ("data.sequence_length=16", "data.sequence_length: frozen 32, now 16"),
        ("schedule.warmup_steps=1", "schedule.warmup_steps: frozen 2, now 1"),
        ("batch.global_size=24", "batch.global_size: frozen 12, now 24"),
        ("precision.compute=bf16", "precision.compute: frozen auto, now bf16"),
        ("model.config.hidden_size=33", "model.config.hidden_size: frozen 30, now 33"),
        ("model.config.new_field=1", "model.config.new_field: frozen None, now 1"),
        ("task.name=mine:Task", "task.name: frozen causal-lm, now mine:Task"),
    ],
)
def test_frozen_settings(load: Callable[..., RunConfig], override: str, difference: str) -> None:
    folder, _ = begin(load())
    add_checkpoint(folder, 3)
    with pytest.raises(UserError) as refused:
        check_continuation(folder, load(override))
    assert f"({difference})" in str(refused.value)
    assert f"checkpoint.from={folder.path}" in str(refused.value)


def test_a_first_attempt_that_saved_nothing_binds_nobody(load: Callable[..., RunConfig]) -> None:
    folder, _ = begin(load("optimizer.lr=1e30"))
    _, attempt = begin(load("optimizer.lr=0.5"))
    assert attempt == 2
    assert folder.frozen_config().optimizer.lr == 0.5


def test_every_difference_is_listed(load: Callable[..., RunConfig]) -> None:
    folder, _ = begin(load())
    add_checkpoint(folder, 3)
    with pytest.raises(UserError, match=r"optimizer.lr: .*; precision.compute: .*; precision.fp8_recipe: .*; seed: "):
        check_continuation(
            folder, load("seed=8", "optimizer.lr=0.5", "precision.compute=fp8", "precision.fp8_recipe=rowwise")
        )


@pytest.mark.parametrize(
    "override",
    [
        "steps=60",
        "batch.micro_size=1",
        "parallel.strategy=ddp",
        "checkpoint.every_steps=2",
        "metrics.every_steps=2",
        "data.cache_dir=/elsewhere",
        "data.num_workers=3",
        "schedule.total_steps=24",
        "optimizer.ema_decay=0.999",
        "launch.threads_per_rank=1",
    ],
)
def test_what_may_change(load: Callable[..., RunConfig], override: str) -> None:
    folder, _ = begin(load())
    add_checkpoint(folder, 3)
    check_continuation(folder, load(override))


def test_a_checkpoint_exists_if_its_manifest_does(load: Callable[..., RunConfig]) -> None:
    folder, _ = begin(load())
    assert folder.newest_checkpoint() is None
    add_checkpoint(folder, 4)
    add_checkpoint(folder, 2)
    folder.checkpoint_path(6).mkdir()
    add_checkpoint(folder, 5).rename(folder.checkpoints_dir / "step-mine")
    assert folder.newest_checkpoint() == (4, folder.checkpoints_dir / "step-00000004")
    assert not finished(folder, load())
    add_checkpoint(folder, 6)
    assert finished(folder, load())
    assert not finished(folder, load("steps=7"))
    manifest = folder.checkpoint_path(6) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-1] + b" ")
    assert not finished(folder, load())


def test_a_run_that_has_only_corrupt_checkpoints_does_not_begin_anew(load: Callable[..., RunConfig]) -> None:
    folder, _ = begin(load())
    add_checkpoint(folder, 4)
    folder.corrupt_dir.mkdir()
    folder.checkpoint_path(4).rename(folder.corrupt_dir / "step-00000004")
    with pytest.raises(UserError, match=r"no checkpoint left, only corrupt ones .*step-00000004.*begin at step 0"):
        begin(load())
    add_checkpoint(folder, 2)
    check_continuation(folder, load())
    shutil.rmtree(folder.corrupt_dir)
    begin(load())


def test_steps_may_not_shrink_below_what_is_done(load: Callable[..., RunConfig]) -> None:
    folder, _ = begin(load())
    add_checkpoint(folder, 4)
    check_continuation(folder, load("steps=4"))
    with pytest.raises(UserError, match=r"steps=3 is less than the 4 steps .*; set steps to at least 4"):
        check_continuation(folder, load("steps=3"))


def test_a_budget_of_tokens_grows_and_shrinks_as_steps_do(load: Callable[..., RunConfig]) -> None:
    def of_tokens(tokens: int) -> RunConfig:
        return load("steps=null", f"tokens={tokens}")

    # 12 sequences of 32 tokens are 384 a step.
    folder, _ = begin(of_tokens(4 * 384))
    add_checkpoint(folder, 4)
    check_continuation(folder, of_tokens(8 * 384))
    check_continuation(folder, load("steps=9"))
    assert finished(folder, of_tokens(4 * 384))
    assert not finished(folder, of_tokens(4 * 384 + 1))
    message = (
        r"tokens=1152 = 3 steps of 384 tokens is less than the 4 steps that .* has done; set tokens to at least 1536\."
    )
    with pytest.raises(UserError, match=message):
        check_continuation(folder, of_tokens(3 * 384))


def test_resume_never_refuses_a_folder_with_checkpoints(load: Callable[..., RunConfig]) -> None:
    folder, _ = begin(load("checkpoint.resume=never"))
    check_continuation(folder, load("checkpoint.resume=never"))
    add_checkpoint(folder, 4)
    with pytest.raises(UserError, match=r"checkpoint.resume=never, but .* has a checkpoint of step 4"):
        check_continuation(folder, load("checkpoint.resume=never"))


def test_folders_that_cannot_be_used(tmp_path: Path, load: Callable[..., RunConfig]) -> None:
    (tmp_path / "file").write_text("")
    config = load(f"output_dir={tmp_path / 'file'}")
    with pytest.raises(UserError, match=r"file is a file; choose another output_dir"):
        check_continuation(RunFolder(config.run_dir), config)
    config = load("output_dir=/proc")
    with pytest.raises(UserError, match=r"output_dir"):
        check_continuation(RunFolder(config.run_dir), config)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no config.yaml"):
        RunFolder(tmp_path).frozen_config()


def test_the_first_outcome_stays(load: Callable[..., RunConfig]) -> None:
    folder, _ = begin(load())
    barrier = threading.Barrier(8)

    def fail(rank: int) -> None:
        barrier.wait()
        folder.write_outcome("failed", 1, 3, f"reason of rank {rank}", rank)

    threads = [threading.Thread(target=fail, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first: dict[str, Any] | None = folder.read_outcome()
    assert first is not None
    assert first == {
        "status": "failed",
        "exit_code": 1,
        "step": 3,
        "reason": f"reason of rank {first['rank']}",
        "rank": first["rank"],
    }
    folder.write_outcome("finished", 0, 6, "all steps done")
    assert folder.read_outcome() == first
    assert [path.name for path in folder.path.iterdir() if path.name.startswith(".outcome")] == []


def test_whoever_has_lost_the_folder_stays_silent(
    load: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease.acquire(load().run_dir)
    folder, _ = begin(load())
    # A rank has it from its launcher.
    monkeypatch.setenv("SHARDLINE_LEASE", "of the previous owner")
    lost = RunFolder(folder.path)
    lost.write_outcome("failed", 1, 3, "lost", 0)
    assert folder.read_outcome() is None
    folder.lease_token = lease.token
    folder.write_outcome("finished", 0, 6, "all steps done", 0)
    outcome = folder.read_outcome()
    assert outcome is not None
    lost.replace_outcome("stopped", 75, 3, "stopped before a restart")
    assert folder.read_outcome() == outcome
    lease.release()


def test_a_half_written_outcome_is_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.outcome_file.write_text('{"status": "fin')
    assert folder.read_outcome() is None
