"""The moving average of a run's weights: saved, continued, moved to other ranks, evaluated, exported.

The same runs measure their gradient noise, whose averages are continued as well.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import read_metrics, shardline, tiny_values, trained, write_config
from trainer.checkpoint.reader import CheckpointReader
from trainer.run_folder.folder import RunFolder

_DECAY = 0.75
_SAVE_ALL = {"every_steps": 1, "keep_last": 0}


def _reader(run_dir: Path, step: int) -> CheckpointReader:
    return CheckpointReader(RunFolder(run_dir).checkpoint_path(step))


def _weights(run_dir: Path, step: int, *, averaged: bool = False) -> dict[str, torch.Tensor]:
    reader = _reader(run_dir, step)
    return {name: reader.read_parameter(name, averaged=averaged) for name in reader.parameter_names()}


def _assert_next(
    average: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], found: dict[str, torch.Tensor]
) -> None:
    for name, tensor in found.items():
        expected = average[name] + (1 - _DECAY) * (weights[name] - average[name])
        assert torch.allclose(tensor, expected, rtol=1e-6, atol=1e-8), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, shared_corpus: tuple[Path, Path]) -> Path:
    """A run of 4 steps on 2 ranks under zero2 that averages its weights and saves each step; returns its folder."""
    corpus, cache = shared_corpus
    root = tmp_path_factory.mktemp("average")
    values = tiny_values(root / "runs", cache, corpus)
    values |= {"name": "straight", "steps": 4, "checkpoint": _SAVE_ALL, "evaluation": {"every_steps": 2}}
    values["optimizer"] |= {"ema_decay": _DECAY}
    values["metrics"] |= {"gradient_noise_scale": True}
    trained(shardline("run", write_config(root / "straight.yaml", values), "--nproc-per-node", 2))
    return root / "runs" / "straight"


def _copy_until(straight: Path, runs: Path, step: int) -> Path:
    copy = runs / "straight"
    shutil.copytree(straight, copy)
    for later in range(step + 1, 5):
        shutil.rmtree(RunFolder(copy).checkpoint_path(later))
    return copy


def test_each_saved_average_is_one_step_from_the_one_before(straight: Path) -> None:
    for step in (2, 3, 4):
        average, weights = _weights(straight, step - 1, averaged=True), _weights(straight, step)
        _assert_next(average, weights, _weights(straight, step, averaged=True))
    first, last = read_metrics(straight)[1], read_metrics(straight)[3]
    for line in (first, last):
        assert line["eval/ema_loss"] != line["eval/loss"]
        assert line["eval/ema_perplexity"] == pytest.approx(2.718281828 ** line["eval/ema_loss"])
    # After two steps the average is still nearer to where training began.
    assert first["eval/ema_loss"] > first["eval/loss"]


def test_a_continued_average_is_bit_for_bit_the_uninterrupted_one(straight: Path, tmp_path: Path) -> None:
    copy = _copy_until(straight, tmp_path / "runs", 2)
    trained(shardline("run", straight / "config.yaml", f"output_dir={tmp_path / 'runs'}", "--nproc-per-node", 2))
    expected = _weights(straight, 4, averaged=True)
    for name, tensor in _weights(copy, 4, averaged=True).items():
        assert torch.equal(tensor, expected[name]), name
    for name in ("eval/ema_loss", "train/noise_scale_tokens"):
        assert read_metrics(copy)[3][name] == read_metrics(straight)[3][name]
    training = _reader(copy, 4).manifest.training
    assert training == _reader(straight, 4).manifest.training
    assert training.noise_variance > 0


@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 3), pytest.param("zero3", 1, marks=pytest.mark.slow)])
def test_the_average_moves_to_other_ranks_and_strategies(
    straight: Path, tmp_path: Path, strategy: str, ranks: int
) -> None:
    copy = _copy_until(straight, tmp_path / "runs", 3)
    overrides = (f"output_dir={tmp_path / 'runs'}", f"parallel.strategy={strategy}", "batch.micro_size=2")
    trained(shardline("run", straight / "config.yaml", *overrides, "--nproc-per-node", ranks))
    _assert_next(_weights(copy, 3, averaged=True), _weights(copy, 4), _weights(copy, 4, averaged=True))
    assert read_metrics(copy)[3]["eval/ema_loss"] == pytest.approx(read_metrics(straight)[3]["eval/ema_loss"], rel=1e-5)
    noise = [_reader(run, 4).manifest.training.noise_variance for run in (copy, straight)]
    # Other micro-batches are other samples of the same noise.
    assert noise[0] == pytest.approx(noise[1], rel=0.3)
    assert noise[0] != noise[1]


@pytest.mark.slow
def test_averaging_may_begin_and_end_in_mid_run(make_config: Callable[..., Path]) -> None:
    config = make_config("later", checkpoint=_SAVE_ALL, steps=1)
    run_dir = config.parent / "runs" / "later"
    trained(shardline("run", config, "--nproc-per-node", 1))
    assert not _reader(run_dir, 1).has_average
    refused = shardline("export", run_dir, "--to", config.parent / "model", "--ema")
    assert refused.returncode == 2
    assert "has no average of the weights; leave out --ema, or train with optimizer.ema_decay" in refused.stderr
    trained(shardline("run", config, "steps=2", f"optimizer.ema_decay={_DECAY}", "--nproc-per-node", 1))
    _assert_next(_weights(run_dir, 1), _weights(run_dir, 2), _weights(run_dir, 2, averaged=True))
    trained(shardline("run", config, "steps=3", "--nproc-per-node", 1))
    assert not _reader(run_dir, 3).has_average
    assert "eval/ema_loss" not in read_metrics(run_dir)[-1]


@pytest.mark.slow
def test_the_average_is_exported_and_generates(straight: Path, tmp_path: Path) -> None:
    finished = shardline("export", straight, "--to", tmp_path / "average", "--ema")
    assert finished.returncode == 0, finished.stderr
    assert "exported the averaged weights of step 4" in finished.stdout
    exported, expected = load_file(tmp_path / "average" / "model.safetensors"), _weights(straight, 4, averaged=True)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in exported.items())
    generate = ("--prompt", "def ", "--max-new-tokens", 8)
    of_run = shardline("generate", straight, *generate, "--ema")
    of_folder = shardline("generate", tmp_path / "average", *generate)
    assert of_run.returncode == 0, of_run.stderr
    assert of_run.stdout == of_folder.stdout
    refused = shardline("generate", tmp_path / "average", *generate, "--ema")
    assert refused.returncode == 2
    assert "is an exported model, which has one set of weights" in refused.stderr
