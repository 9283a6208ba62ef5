"""Samples that ``data.factory`` makes: trained on, continued, evaluated, shown; and what is wrong with them."""

import os
from pathlib import Path
from typing import Any

import pytest

from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, computed_lines, saved_state
from tests.support import run_on_ranks, shardline
from tests.trainer.data.own_samples import EDITION_VARIABLE, Points
from trainer.config import parse_config
from trainer.config.rules import World
from trainer.data.prepare import describe_corpus, prepare_samples
from trainer.data.prepared import find_prepared
from trainer.data.prepared_own import PreparedOwn
from trainer.deploy.allowed_code import AllowedCode
from trainer.evaluation.on_ranks import evaluate_here
from trainer.evaluation.subject import Asked, find_subject
from trainer.plan.preview import preview
from trainer.run_folder.folder import RunFolder

_POINTS = "tests.trainer.data.own_samples:Points"


def _values(root: Path, name: str, factory: str = _POINTS, **arguments: Any) -> dict[str, Any]:
    return {
        "name": name,
        "epochs": 1.5,
        "output_dir": str(root / "runs"),
        "task": {"name": "classification"},
        "model": {"builtin": "mlp", "arguments": {"hidden_sizes": [8]}},
        "data": {"source": "factory", "factory": factory, "arguments": arguments, "cache_dir": str(root / "cache")},
        "batch": {"global_size": 12, "micro_size": 2},
        "optimizer": {"lr": 3e-2},
        "metrics": {"every_steps": 1},
        "evaluation": {"every_steps": 3},
        "checkpoint": {"every_steps": 3},
        "tracking": {"wandb": {"mode": "disabled"}},
    }


def _counted(values: dict[str, Any]) -> Any:
    # The launcher counts them elsewhere.
    return parse_config(values | {"epoch_samples": 97}, "test")


def _train(ranks: Ranks, root: Path) -> None:
    runs = RunsInProcess(ranks, root, root)
    runs.train_as(_counted(_values(root, "whole")))
    runs.train_as(_counted(_values(root, "halves")), stop_at=5)
    os.environ[EDITION_VARIABLE] = "b"
    with pytest.raises(UserError, match="was trained on another corpus"):
        runs.train_as(_counted(_values(root, "halves")))
    del os.environ[EDITION_VARIABLE]
    runs.train_as(_counted(_values(root, "halves")))
    runs.train_as(_counted(_values(root, "one-hot", one_hot=True)))
    asked = Asked(str(root / "runs" / "whole"), split="test", allowed=AllowedCode(factories=(_POINTS,)))
    work = root / f"work-{ranks.rank}"
    work.mkdir()
    found = evaluate_here(find_subject(asked, ranks.world_size, work), ranks)
    assert found["samples"] == 13
    assert sum(map(sum, found["confusion"])) == 13


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks: whole, in halves, and with labels one-hot."""
    root = tmp_path_factory.mktemp("own")
    run_on_ranks(_train, 2, root)
    return root


def test_a_stopped_run_continues_bit_for_bit(root: Path) -> None:
    whole, halves = (RunFolder(root / "runs" / name) for name in ("whole", "halves"))
    lines = computed_lines(whole)
    # 97 samples one and a half times, in steps of 12.
    assert [line["step"] for line in lines] == list(range(1, 14))
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert computed_lines(halves) == lines
    (training, tensors), (other, others) = saved_state(whole, 13), saved_state(halves, 13)
    assert training == other
    assert all(tensor.equal(others[name]) for name, tensor in tensors.items())


def test_one_hot_labels_train_as_classes_do(root: Path) -> None:
    classes, one_hot = (computed_lines(RunFolder(root / "runs" / name)) for name in ("whole", "one-hot"))
    for name in ("train/loss", "eval/loss", "eval/accuracy"):
        expected = [line[name] for line in classes if name in line]
        assert len(expected) >= 4
        assert [line[name] for line in one_hot if name in line] == pytest.approx(expected, rel=1e-5)


def test_a_run_is_evaluated_and_shown_without_code_that_nobody_allowed(root: Path, tmp_path: Path) -> None:
    run = root / "runs" / "whole"
    with pytest.raises(UserError, match=f"asks for Python code by data.factory={_POINTS}; read that code, and give"):
        find_subject(Asked(str(run)), 1, tmp_path)
    allowed = AllowedCode(factories=(_POINTS,))
    with pytest.raises(UserError, match=r"--data: the run's samples are made by data.factory="):
        find_subject(Asked(str(run), files=("x.csv",), allowed=allowed), 1, tmp_path)
    shown = shardline("data", "show", run, "--step", 9)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert len(lines) == 12
    assert lines[0].startswith("step 9, sample 0: position 96, epoch 0, index ")
    assert lines[1].startswith("step 9, sample 1: position 97, epoch 1, index ")


def test_it_is_known_before_ranks_start(root: Path) -> None:
    config = parse_config(_values(root, "new"), "test")
    described = "\n".join(preview(config, World(2, has_gpu=False)).lines())
    assert "97 rows; the run reads 1.61 epochs" in described
    assert describe_corpus(prepare_samples(config.data)).startswith("train       97 samples\nvalidation  11 samples\n")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"factory": None}, r"data.source=factory needs data.factory, which is None; name a module:function"),
        ({"factory": "points"}, r"data.source=factory needs data.factory, which is points; name a module:function"),
        ({"factory": "nowhere:Points"}, r"data.factory=nowhere:Points cannot be imported: No module named 'nowhere'"),
        ({"factory": f"{_POINTS}s"}, r"has no 'Pointss'; check the module and what it names"),
        ({"arguments": {"size": 3}}, r"cannot be called with data.arguments=\{'size': 3\} \(got an unexpected keyword"),
        ({"factory": "tests.trainer.data.own_samples:nothing"}, r"made list, which has no fingerprint, facts, num_sam"),
        ({"factory": "tests.trainer.data.own_samples:none_to_train_on"}, r"none to train on; let num_samples\('train'"),
        ({"arguments": {"num_validation": -1}}, r"'validation': -1, .* let these be a text that is not empty"),
        ({"validation_fraction": 0.5}, r"data.validation_fraction=0.5 has no effect under data.source=factory"),
        ({"source": "digits", "arguments": {}}, r"data.factory=\S+ goes with data.source=factory only"),
        ({"label": "kind"}, r"data.label=kind has no effect under data.source=factory"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    values = _values(tmp_path, "wrong")
    values["data"] |= changes
    with pytest.raises(UserError, match=sentence):
        prepare_samples(parse_config(values, "test").data)


def test_what_does_not_go_with_samples_of_ones_own(tmp_path: Path) -> None:
    def refused(sentence: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=sentence):
            parse_config(_values(tmp_path, "wrong") | changes, "test")

    refused("tokens=100 counts samples of data.sequence_length tokens", epochs=None, tokens=100)
    bert = {"architecture": "bert"}
    refused("data.source=factory makes samples of your own, but task.name=masked-lm reads packed tokens",
            task={"name": "masked-lm"}, model=bert)  # fmt: skip
    own_set = {"every_steps": 1, "sets": [{"name": "more", "source": "factory"}]}
    refused("evaluation.sets more.source=factory: samples of your own are all that a run reads", evaluation=own_set)
    source = {"name": "one", "weight": 1.0, "source": "factory"}
    refused("data.mixture one.source=factory: samples of your own are all", data={"mixture": [source]},
            task={"name": "causal-lm"}, model={"architecture": "llama"})  # fmt: skip


def test_a_run_is_told_the_length_that_samples_have(tmp_path: Path) -> None:
    def check(told: int, **arguments: Any) -> None:
        values = _values(tmp_path, "long", **arguments)
        values["data"]["sequence_length"] = told
        data = parse_config(values, "test").data
        prepare_samples(data).check_sequence_length(data.sequence_length)

    check(9, length=9)
    check(256)
    with pytest.raises(UserError, match=r"data.sequence_length=8, but the facts of \S+ say that samples have 9 tokens"):
        check(8, length=9)
    with pytest.raises(UserError, match=r"data.sequence_length=8 has no effect, since the facts of"):
        check(8)


def test_samples_that_are_others_at_the_next_call_are_refused(tmp_path: Path) -> None:
    config = parse_config(_values(tmp_path, "moody", "tests.trainer.data.test_own_samples:moody"), "test")
    prepared = prepare_samples(config.data)
    found = find_prepared(config.data)
    assert isinstance(found, PreparedOwn)
    assert found.fingerprint == prepared.fingerprint
    with pytest.raises(UserError, match=r"makes other samples than those that .* was written of; let it make the same"):
        found.samples()


_calls = iter(range(100))


def moody() -> Any:
    """Is another one at each call."""
    return Points(version=next(_calls))
