"""``shardline prune``: a checkpoint becomes a run with zeros, which is evaluated, exported and trained on as others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, saved_state
from tests.saved_state import stored_state
from tests.support import refused, run_on_ranks, shardline, trained, write_corpus
from trainer.checkpoint.reader import open_checkpoint
from trainer.config import load_config
from trainer.deploy.allowed_code import AllowedCode
from trainer.deploy.prune_run import prune_run
from trainer.deploy.sparse_folder import load_sparse
from trainer.run_folder.folder import RunFolder

_STEP = 4
_LAYERS = "model.layers.*"


def _prune(root: Path, source: str, target: str, **settings: Any) -> dict[str, int]:
    run = str(root / "runs" / source)
    found = prune_run(open_checkpoint(run, None), run, root / "runs" / target, settings, AllowedCode())
    return {one.name: one.num_kept for one in found}


def _train(ranks: Ranks, root: Path, corpus: Path) -> None:
    runs = RunsInProcess(ranks, root, corpus)
    alone = {"strategy": "none"}
    adamw = {"ema_decay": 0.5}
    runs.train("dense", steps=_STEP, parallel=alone, optimizer=adamw, evaluation={"every_steps": 2})
    runs.train("sgd", steps=1, parallel=alone, optimizer={"name": "sgd"})
    _prune(root, "dense", "half", sparsity=0.5, by="importance", exclude=["*.q_proj.weight", "*.k_proj.weight"])
    _prune(root, "dense", "gradient", sparsity=0.8, by="gradient", scope="layer", parameters=[_LAYERS])
    for source, target, settings, sentence in (
        ("sgd", "none", {"sparsity": 0.5, "by": "importance"}, "--by importance judges by AdamW's second moments"),
        ("dense", "none", {"sparsity": 0.0}, "--sparsity 0 prunes nothing"),
        ("dense", "none", {"sparsity": 1.0}, "prune.sparsity=1 leaves no weight"),
        ("dense", "half", {"sparsity": 0.5}, "half is not empty; name a new folder"),
        ("dense", ".none", {"sparsity": 0.5}, "name='.none': string should match pattern"),
        ("dense", "none", {"sparsity": 0.5, "parameters": ["*.k_prob.*"]}, "nearest names are .*k_proj.weight"),
        (
            "dense",
            "none",
            {"sparsity": 0.5, "by": "size"},
            "prune.by=.*'magnitude', 'gradient', 'importance' or 'random'",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            _prune(root, source, target, **settings)
        assert not (root / "runs" / "none").exists()
    runs.train_as(load_config(root / "runs" / "half" / "config.yaml", [f"steps={_STEP + 3}"]))
    weights = {"from": str(root / "runs" / "half"), "load": "weights"}
    runs.train("tuned", steps=3, parallel=alone, checkpoint=weights, optimizer={"name": "adafactor", "lr": 0.1})
    runs.train("regrown", steps=3, parallel=alone, checkpoint=weights, prune={"keep_masks": False})
    with pytest.raises(UserError, match=r"begins with pruned weights, which metrics.gradient_noise_scale=true"):
        runs.train("noise", steps=3, parallel=alone, checkpoint=weights, metrics={"gradient_noise_scale": True})
    # Part of them was pruned before.
    more = {"sparsity": 0.75, "begin": 1, "end": 3, "every": 1}
    runs.train("more", steps=3, parallel=alone, checkpoint=weights, prune=more)
    everything = {"from": str(root / "runs" / "dense")}
    with pytest.raises(UserError, match=f"prune.end=3 is over at step {_STEP}, with which this run begins"):
        runs.train("late", steps=8, parallel=alone, optimizer=adamw, checkpoint=everything, prune=more)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, pruned ones of it, and what begins with these."""
    root = tmp_path_factory.mktemp("prune")
    run_on_ranks(_train, 1, root, write_corpus(root / "corpus"), timeout_s=200)
    return root


def _state(root: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    return stored_state(RunFolder(root / "runs" / name).checkpoint_path(step))


def _pruned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Where each parameter was pruned."""
    return {name.removeprefix("mask/"): ~mask for name, mask in state.items() if name.startswith("mask/")}


def _zeros_are_where(state: dict[str, torch.Tensor], pruned: dict[str, torch.Tensor], *prefixes: str) -> bool:
    return all(
        torch.equal(state[f"{prefix}/{name}"] == 0, where) for name, where in pruned.items() for prefix in prefixes
    )


def test_the_least_important_weights_are_zero_with_all_that_follows_them(root: Path) -> None:
    dense, half = _state(root, "dense", _STEP), _state(root, "half", _STEP)
    pruned = _pruned(half)
    assert len(pruned) == 3 * 5
    assert _zeros_are_where(half, pruned, "model", "ema")
    scores, gone = [], []
    for name, where in pruned.items():
        moment = f"optimizer/{name}/exp_avg"
        assert not half[moment][where].any()
        assert not half[f"{moment}_sq"][where].any()
        scores.append((dense[f"model/{name}"].double() ** 2 * dense[f"{moment}_sq"].double()).flatten())
        gone.append(where.flatten())
        for kind in (f"model/{name}", f"ema/{name}", moment):
            assert torch.equal(half[kind][~where], dense[kind][~where])
    score, where = torch.cat(scores), torch.cat(gone)
    assert int(where.sum()) == round(len(where) / 2)
    assert score[where].max() <= score[~where].min() * (1 + 1e-5)
    others = [name for name in dense if name.split("/")[1] not in pruned]
    assert len(others) == 14 * (2 + 3)
    assert all(torch.equal(dense[name], half[name]) for name in others)


def test_the_mean_squared_gradient_of_each_layer(root: Path) -> None:
    dense, state = _state(root, "dense", _STEP), _state(root, "gradient", _STEP)
    for name, where in _pruned(state).items():
        assert int(where.sum()) == round(0.8 * where.numel())
        squares = dense[f"optimizer/{name}/exp_avg_sq"]
        assert squares[where].max() <= squares[~where].min()


def test_it_is_a_run_that_goes_on(root: Path) -> None:
    half, longer = _state(root, "half", _STEP), _state(root, "half", _STEP + 3)
    pruned = _pruned(half)
    assert all(torch.equal(where, _pruned(longer)[name]) for name, where in pruned.items())
    assert _zeros_are_where(longer, pruned, "model", "ema")
    assert not torch.equal(half["model/model.norm.weight"], longer["model/model.norm.weight"])
    training = saved_state(RunFolder(root / "runs" / "half"), _STEP)[0]
    before = saved_state(RunFolder(root / "runs" / "dense"), _STEP)[0]
    assert before.eval_metrics
    assert not training.eval_metrics
    assert (training.step, training.num_samples, training.num_tokens) == (_STEP, before.num_samples, before.num_tokens)


def test_what_begins_with_it_keeps_the_zeros_unless_told_otherwise(root: Path) -> None:
    pruned = _pruned(_state(root, "half", _STEP + 3))
    tuned, regrown, more = (_state(root, name, 3) for name in ("tuned", "regrown", "more"))
    assert _zeros_are_where(tuned, pruned, "model")
    assert not _pruned(regrown)
    assert all(bool((regrown[f"model/{name}"] != 0).all()) for name in pruned)
    now = _pruned(more)
    assert all(bool(now[name][where].all()) for name, where in pruned.items())
    # Queries and keys, which had no masks, are pruned too.
    assert len(now) == 3 * 7
    assert sum(int(where.sum()) for where in now.values()) == round(0.75 * sum(where.numel() for where in now.values()))
    assert _zeros_are_where(more, now, "model")


def test_the_command(root: Path, tmp_path: Path) -> None:
    run, target = root / "runs" / "dense", tmp_path / "pruned"
    done = shardline("prune", run, "--to", target, "--sparsity", 0.5, "--parameters", _LAYERS)
    trained(done)
    assert "parameter" in done.stdout
    assert f"pruned 12,555 of 25,110 weights of step {_STEP}: {target}" in done.stdout
    evaluated = shardline("evaluate", target, "--json")
    trained(evaluated)
    trained(shardline("checkpoint", "verify", target))
    exported = shardline("export", target, "--to", tmp_path / "export")
    trained(exported)
    stored = load_file(tmp_path / "export" / "model.safetensors")
    exported_size = (tmp_path / "export" / "model.safetensors").stat().st_size
    assert "prune:\n" in (tmp_path / "export" / "README.md").read_text()
    zeros = sum(int((tensor == 0).sum()) for name, tensor in stored.items() if ".layers." in name)
    assert zeros == 12_555
    sparse = shardline("export", target, "--to", tmp_path / "sparse", "--sparse")
    trained(sparse)
    assert not (tmp_path / "sparse" / "model.safetensors").exists()
    again = load_sparse(tmp_path / "sparse")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    assert (tmp_path / "sparse" / "model.sparse.safetensors").stat().st_size < 0.8 * exported_size
    refused(
        shardline("export", run, "--to", tmp_path / "none", "--sparse"), "no weight of this model has so many zeros"
    )
    refused(shardline("export", target, "--to", tmp_path / "none", "--sparse", "--format", "onnx"), "--format onnx")
    assert not (tmp_path / "none").exists()
    refused(shardline("prune", run, "--to", target), "not empty")
    refused(shardline("prune", run, "--to", tmp_path / "other", "--sparsity", 1.5), "prune.sparsity")
