"""Early stop: training ends where what is monitored no longer improves, on all ranks alike, however often continued."""

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from sharding.engine import Batch
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, computed_lines, saved_state
from tests.support import run_on_ranks, shardline, tiny_values, write_corpus, write_empty_checkpoint
from trainer.attempt import finished
from trainer.checkpoint.finish import after_evaluation, finish_reason
from trainer.checkpoint.retention import prune_checkpoints
from trainer.checkpoint.training_state import MonitorState, TrainingState
from trainer.config import RunConfig, parse_config
from trainer.config.checkpoint import CheckpointConfig
from trainer.data.facts import SampleFacts
from trainer.run_folder.folder import RunFolder
from trainer.tasks.causal_lm import CausalLanguageModelling
from trainer.tasks.monitor import check_monitor
from trainer.tasks.registry import configured_task
from trainer.tasks.task import Metric, Outputs, Sums

_NONE = TrainingState(
    step=0, num_samples=0, num_tokens=0, num_skipped_steps=0, num_skipped_in_a_row=0, schedule_total_steps=1, seed=1
)


def _config(folder: Path, **sections: Any) -> RunConfig:
    return parse_config(tiny_values(folder / "runs", folder / "cache", folder / "corpus") | sections, "test")


@pytest.mark.parametrize(
    ("better", "min_delta", "values", "counts"),
    [
        ("lower", 0.0, [3.0, 2.0, 2.0, 2.5, 1.9], [0, 0, 1, 2, 0]),
        ("higher", 0.0, [0.1, 0.3, 0.3, 0.2, 0.4], [0, 0, 1, 2, 0]),
        # What is gained little by little counts from the best value that counted.
        ("lower", 0.5, [3.0, 2.6, 2.5, 2.4, 2.4], [0, 1, 2, 0, 1]),
        ("higher", 0.5, [1.0, 1.4, 1.5, 1.6], [0, 1, 2, 0]),
        ("lower", 0.0, [math.nan, math.inf, 2.0, math.nan], [1, 2, 0, 1]),
    ],
)
def test_evaluations_without_an_improvement_are_counted(
    tmp_path: Path, better: Literal["lower", "higher"], min_delta: float, values: list[float], counts: list[int]
) -> None:
    evaluation = {"every_steps": 1, "monitor": "f1", "patience": 2, "min_delta": min_delta}
    config = _config(tmp_path, evaluation=evaluation, steps=100)
    training, found, reasons = _NONE, [], []
    for step, value in enumerate(values, start=1):
        training = training.model_copy(update={"step": step})
        training = after_evaluation(training, config, {"loss": (1.0, "lower"), "f1": (value, better)})
        assert TrainingState.model_validate(training.model_dump(mode="json")) == training
        assert training.eval_metrics == ({"loss": 1.0} | ({"f1": value} if math.isfinite(value) else {}))
        found.append(training.monitor.num_not_better)
        reasons.append(finish_reason(training, config) is not None)
    assert found == counts
    assert reasons == [count >= 2 for count in counts]


def test_another_monitor_begins_anew_and_a_larger_patience_goes_on(tmp_path: Path) -> None:
    state = MonitorState(metric="loss", best=1.25, best_step=4, num_not_better=3)
    training = _NONE.model_copy(update={"step": 10, "monitor": state})

    def reason(**evaluation: Any) -> str | None:
        return finish_reason(training, _config(tmp_path, evaluation={"every_steps": 2} | evaluation, steps=100))

    assert reason(patience=3) == (
        "stopped early: eval/loss, at best 1.25 after step 4, has not improved in 3 evaluations (evaluation.patience=3)"
    )
    assert reason(patience=4) is None
    assert reason(patience=0) is None
    assert reason(patience=2, monitor="perplexity") is None
    config = _config(tmp_path, evaluation={"every_steps": 2, "patience": 2, "monitor": "perplexity"}, steps=100)
    after = after_evaluation(training, config, {"loss": (9.0, "lower"), "perplexity": (7.0, "lower")})
    assert after.monitor == MonitorState(metric="perplexity", best=7.0, best_step=10)
    with pytest.raises(UserError, match=r"evaluation.monitor=perplexity is no metric .* which has f1, loss; name one"):
        after_evaluation(training, config, {"loss": (9.0, "lower"), "f1": (0.5, "higher")})


def test_an_evaluation_at_the_end_alone_does_not_count(tmp_path: Path) -> None:
    """So that a run that goes on stops where one would that was longer from the start."""
    config = _config(tmp_path, evaluation={"every_steps": 4, "patience": 2}, steps=6)
    last = after_evaluation(_NONE.model_copy(update={"step": 6}), config, {"loss": (1.0, "lower")})
    assert (last.eval_metrics, last.monitor) == ({"loss": 1.0}, MonitorState())


@pytest.mark.parametrize(("better", "kept"), [("lower", {2, 4, 5}), ("higher", {1, 3, 5})])
def test_the_best_checkpoints_are_those_of_the_monitored_metric(tmp_path: Path, better: Any, kept: set[int]) -> None:
    for step, value in enumerate((0.4, 0.2, 0.9, 0.1), start=1):
        write_empty_checkpoint(tmp_path / f"step-{step:08d}", step, eval_metrics={"loss": step, "accuracy": value})
    # The newest was not evaluated; one of before this was known has no direction.
    monitor = MonitorState(metric="accuracy", better=better)
    write_empty_checkpoint(tmp_path / "step-00000005", 5, monitor=monitor)
    prune_checkpoints(tmp_path, CheckpointConfig(keep_last=1, keep_best=2), "accuracy", lambda: None)
    assert {int(path.name[5:]) for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (
            {"evaluation": {"every_steps": 2, "min_delta": 0.1}},
            "evaluation.min_delta=0.1 goes with evaluation.patience only",
        ),
        ({"evaluation": {"patience": 2}}, "evaluation.patience=2 goes with evaluation.every_steps only"),
    ],
)
def test_settings_without_an_effect_are_refused(tmp_path: Path, sections: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        _config(tmp_path, **sections)


def test_monitors_of_sets_and_of_the_average_are_known_before_training(tmp_path: Path) -> None:
    def check(monitor: str, task: str = "causal-lm", **sections: Any) -> None:
        evaluation = {"every_steps": 2, "patience": 1, "monitor": monitor} | sections.pop("evaluation", {})
        values: dict[str, Any] = {"task": {"name": task}, "evaluation": evaluation, "model": {"architecture": "llama"}}
        config = _config(tmp_path, **values | sections)
        check_monitor(config, configured_task(config.task, SampleFacts(vocab_size=300)))

    own_set = {"sets": [{"name": "other", "source": "text", "paths": ["x.txt"]}]}
    check("loss")
    # Whether the tokenizer tells of bytes is not known before there is one.
    check("bits_per_byte")
    check("accuracy", "masked-lm")
    check("other/perplexity", evaluation=own_set)
    check("ema_other/loss", evaluation=own_set, optimizer={"ema_decay": 0.9})
    for monitor in ("other/loss", "ema_loss", "accuracy"):
        with pytest.raises(UserError, match=f"evaluation.monitor={monitor} is no metric of task.name=causal-lm"):
            check(monitor)


class OwnMetrics(CausalLanguageModelling):
    """Has a metric that its class does not announce."""

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        return super().evaluate(outputs, batch) | {"rows": torch.tensor(1.0)}

    def metrics(self, sums: Any) -> dict[str, Metric]:
        return {"rows": Metric(float(sums["rows"]), "higher")}


_STALLS = {"every_steps": 1, "patience": 2, "min_delta": 100.0}


def _train(ranks: Ranks, root: Path, corpus: Path) -> None:
    runs = RunsInProcess(ranks, root, corpus)
    # The first evaluation is the best; the third is the second without an improvement.
    runs.train("early", evaluation=_STALLS)
    runs.train("halves", evaluation=_STALLS, stop_at=3)
    runs.train("halves", evaluation=_STALLS)
    runs.train("longer", evaluation=_STALLS)
    runs.train("longer", evaluation=_STALLS | {"patience": 4})
    own = {"name": "tests.trainer.test_early_stop:OwnMetrics"}
    runs.train("own", task=own, evaluation={"every_steps": 1, "patience": 1, "monitor": "rows"})
    for name, task, metrics in (("wrong", {}, "loss, perplexity, .*"), ("wrong-own", own, "rows")):
        sentence = f"evaluation.monitor=f1 is no metric of .* which has {metrics}; name one of them"
        with pytest.raises(UserError, match=sentence):
            runs.train(name, task=task, evaluation={"every_steps": 1, "patience": 1, "monitor": "f1"})


def test_runs_stop_early_and_go_on(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    run_on_ranks(_train, 2, tmp_path, corpus)
    folders = {name: RunFolder(tmp_path / "runs" / name) for name in ("early", "halves", "longer", "own")}
    newest = {name: (folder.newest_checkpoint() or (0,))[0] for name, folder in folders.items()}
    assert newest == {"early": 3, "halves": 3, "longer": 5, "own": 2}
    assert computed_lines(folders["halves"]) == computed_lines(folders["early"])
    (one, tensors), (other, others) = saved_state(folders["early"], 3), saved_state(folders["halves"], 3)
    assert one.monitor == other.monitor
    assert (one.monitor.best_step, one.monitor.num_not_better) == (1, 2)
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    config = folders["early"].frozen_config()
    ended = finished(folders["early"], config)
    assert ended is not None
    assert ended[0].step == 3
    again = shardline("run", folders["early"].config_file, "--nproc-per-node", 2)
    assert again.returncode == 0, again.stderr
    assert f"run early is complete at step 3, {ended[2]}; nothing to do." in again.stdout
    assert "run it with evaluation.patience=4, say" in again.stdout
    # More steps are no reason to go on.
    assert finished(folders["early"], config.model_copy(update={"steps": 100})) is not None
