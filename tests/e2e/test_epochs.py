"""A run by epochs: its steps are counted with its corpus, alike for launcher, ranks and whoever reads the folder."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.support import read_metrics, shardline, start_torchrun, trained, training_curve
from trainer.config import load_config
from trainer.data.prepared import find_prepared
from trainer.run_folder.folder import RunFolder

MakeConfig = Callable[..., Path]


def test_epochs_from_the_dry_run_to_more_of_them(make_config: MakeConfig) -> None:
    schedule = {"name": "linear", "warmup_steps": 0, "warmup_fraction": 0.25, "total_steps": 0}
    evaluation = {"every_steps": 3}
    config = make_config("epochs", steps=None, epochs=0.5, schedule=schedule, evaluation=evaluation)
    folder = RunFolder(config.parent / "runs" / "epochs")
    elsewhere = f"data.cache_dir={config.parent / 'empty'}"
    planned = shardline("run", config, elsewhere, "--dry-run", "--nproc-per-node", 2)
    assert planned.returncode == 0, planned.stderr
    assert "how many steps the epochs are is known once the corpus is prepared" in planned.stdout

    trained(shardline("run", config, "--nproc-per-node", 2))
    corpus = find_prepared(load_config(config).data)
    assert corpus is not None
    num_samples = corpus.stream("train").num_samples(32)
    steps = -(-num_samples // 24)
    assert folder.frozen_config().epoch_samples == num_samples
    rates = [line["train/learning_rate"] for line in read_metrics(folder.path)]
    assert len(rates) == steps
    assert rates.index(max(rates)) + 1 == -(-steps // 4)

    planned = shardline("run", config, "--dry-run", "--nproc-per-node", 2)
    assert f"{384 * steps:,} in {steps} steps" in planned.stdout, planned.stderr
    assert "the run reads 0.5" in planned.stdout
    assert f"continues     nothing: complete at step {steps}" in planned.stdout
    again = shardline("run", config, "--nproc-per-node", 2)
    assert f"complete at step {steps}; nothing to do" in again.stdout
    assert "run it with epochs=1, say" in again.stdout
    less = shardline("run", config, "epochs=0.25", "--nproc-per-node", 2)
    assert less.returncode == 2
    assert f"steps of 12 of {num_samples} samples is less than the {steps} steps that" in less.stderr
    by_hand = shardline("run", config, "epoch_samples=7", "--nproc-per-node", 2)
    assert f"epoch_samples=7, but the training split has {num_samples} samples; remove it" in by_hand.stderr

    # Into the second epoch, on the old curve, which has ended.
    trained(shardline("run", config, "epochs=1.1", "--nproc-per-node", 2))
    lines = read_metrics(folder.path)
    assert len(lines) == -(-11 * num_samples // 120)
    assert lines[-1]["train/learning_rate"] == rates[-1]
    shown = shardline("data", "show", folder.path, "--step", -(-num_samples // 12), "--limit", 12)
    assert "epoch 1" in shown.stdout, shown.stderr


def test_ranks_that_no_launcher_of_ours_started_count_for_themselves(make_config: MakeConfig) -> None:
    config = make_config("bare", steps=None, epochs=0.25, schedule={"warmup_steps": 0, "total_steps": 0})
    process = start_torchrun(config, log=config.parent / "bare.log")
    assert process.wait(timeout=120) == 0, (config.parent / "bare.log").read_text()
    folder = RunFolder(config.parent / "runs" / "bare")
    frozen = folder.frozen_config()
    assert frozen.epoch_samples is not None
    assert json.loads(folder.outcome_file.read_text())["step"] == frozen.num_steps == -(-frozen.epoch_samples // 48)
    assert len(training_curve(folder.path)) == frozen.num_steps
    # It goes on under a launcher of ours.
    trained(shardline("run", config, "epochs=0.5", "--nproc-per-node", 2))
    assert len(training_curve(folder.path)) == -(-frozen.epoch_samples // 24)
