"""Spikes and non-finite steps on two ranks, in whole runs: what is notified, skipped and rolled back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sharding.ranks.errors import NonFiniteFailure, RunFailure, UserError
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, saved_state
from tests.support import read_metrics, run_on_ranks
from trainer.checkpoint.step_positions import positions_of_step
from trainer.faults.injection.inject import Fault
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import RunFolder
from trainer.runtime.phases import Phase

_STEPS = 10
_CURVE = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "train/tokens")
# Judged from the fifth step on; only a multiplied loss is that far out in so young a run.
_JUDGED = {"spike_window_steps": 8, "spike_warmup_steps": 4, "spike_threshold": 50.0}
# Step 7 of 12 sequences each.
_CORRUPTED = [[72, 84]]


def _assert_same_end(folder: RunFolder, told: RunFolder) -> None:
    (state, tensors), (told_state, told_tensors) = saved_state(folder, _STEPS), saved_state(told, _STEPS)
    assert tensors.keys() == told_tensors.keys()
    for name, tensor in told_tensors.items():
        assert torch.equal(tensors[name], tensor), (folder.path.name, name)
    # All counters, what later steps are compared with, and the samples that are skipped.
    assert state.model_copy(update={"num_rollbacks": 0}) == told_state, folder.path.name
    assert _curve(folder) == _curve(told)


def _curve(folder: RunFolder) -> list[tuple[Any, ...]]:
    return [tuple(line[name] for name in _CURVE) for line in read_metrics(folder.path)]


def _events(folder: RunFolder) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for event in read_events(folder.path):
        found.setdefault(event["kind"], []).append(event)
    return found


def _spike(step: int = 7, num_steps: int = 1, kind: Any = "spike") -> list[Fault]:
    return [Fault(fault=kind, rank=1, step=step, num_steps=num_steps)]


def _check_told_later(runs: RunsInProcess, told: RunFolder) -> None:
    """What a spike's line advises: a run that is continued skips what it is told then."""
    runs.train("told-later", steps=6, faults=_JUDGED)
    for steps in (8, _STEPS):
        later = runs.train("told-later", steps=steps, data={"skip_samples": _CORRUPTED}, faults=_JUDGED)
    _assert_same_end(later, told)
    if runs.ranks.rank == 0:
        (skipped_event,) = _events(later)["samples_skipped"]
        assert (skipped_event["attempt"], skipped_event["step"], skipped_event["samples"]) == (2, 6, _CORRUPTED)
        assert skipped_event["documents"]
    with pytest.raises(UserError, match=r"skip_samples=\[\[0, 12\]\] names samples before position"):
        runs.train("told-later", steps=12, data={"skip_samples": [[0, 12]]}, faults=_JUDGED)


def _check_too_many(runs: RunsInProcess) -> None:
    """Every step counts, however seldom there are lines of metrics."""
    faults = {"max_nonfinite_steps": 3, "spike_policy": "off"}
    with pytest.raises(
        NonFiniteFailure, match=r"not finite in \d+ steps in a row .*max_nonfinite_steps=3\), all of them"
    ):
        runs.train(
            "never-finite",
            _spike(2, 99, "nan"),
            steps=60,
            metrics={"every_steps": 0},
            checkpoint={"every_steps": 0},
            faults=faults,
        )
    # The fourth step is too much; the bound is twice ten steps.
    assert runs.phases.now.step <= 4 + 20
    # The curve of these runs ends at step 12.
    runs.train("beyond", steps=14, faults={"spike_policy": "off"})
    if runs.ranks.rank == 0:
        said = " ".join(runs.console("beyond").split())
        assert said.count("ends at step 12: steps 13 to 14 train at 0.1 x optimizer.lr") == 1
        assert "set schedule.total_steps=14" in said


def _check_skip(runs: RunsInProcess, told: RunFolder) -> None:
    """A step that is bad on one rank is taken again by all with the samples that follow."""
    faults = {"spike_policy": "skip", **_JUDGED}
    for kind in ("spike", "nan"):
        skipped = runs.train(f"skip-{kind}", _spike(kind=kind), faults=faults)
        _assert_same_end(skipped, told)
        assert [line["train/skipped_steps"] for line in read_metrics(skipped.path)] == [0] * _STEPS
        if runs.ranks.rank == 0:
            events = _events(skipped)
            (bad,) = events["spike" if kind == "spike" else "nonfinite"]
            (skipped_event,) = events["samples_skipped"]
            assert (bad["step"], bad["action"], bad["samples"]) == (7, "skip", _CORRUPTED)
            assert skipped_event["samples"] == _CORRUPTED
            assert skipped_event["documents"] == bad["documents"] != []
            assert all(Path(document["id"]).parent.name == "documents" for document in skipped_event["documents"])
            assert "warning: step 7: " in runs.console(f"skip-{kind}")
    with pytest.raises(RunFailure, match="3 batches in a row were bad at step 7"):
        runs.train("skip-all", _spike(num_steps=9), faults=faults | {"max_consecutive_skips": 2})
    # Not in saving, which has since come to an end.
    assert runs.phases.now.phase is Phase.TRAIN


def _check_rollback(runs: RunsInProcess, told: RunFolder) -> None:
    """The run rolls back, skips the samples, and is continued as if they had never been there."""
    faults = {"spike_policy": "rollback", **_JUDGED}
    # Judged after step 9, once the checkpoints of steps 3 and 6 are there and that of step 9 is not yet.
    logging = {"metrics": {"every_steps": 0}, "faults": faults}
    folder = runs.train("rollback", _spike(), steps=9, **logging)
    if runs.ranks.rank == 0:
        events = _events(folder)
        assert [(event["step"], event["action"], event["samples"]) for event in events["spike"]] == [
            (7, "rollback", _CORRUPTED)
        ]
        assert [(event["step"], event["to_step"]) for event in events["rollback"]] == [(7, 6)]
        assert [event["samples"] for event in events["samples_skipped"]] == [_CORRUPTED]
        assert "the run rolls back to step 6" in runs.console("rollback")
        config = folder.frozen_config()
        # Step 6 as ever, and step 7 with the samples that follow the corrupted ones.
        assert positions_of_step(folder, config, 6).tolist() == list(range(60, 72))
        assert positions_of_step(folder, config, 7).tolist() == list(range(84, 96))
    dist.barrier()
    # The fault is still there for whoever reads these samples.
    folder = runs.train("rollback", _spike(), **logging)
    (state, tensors), (told_state, told_tensors) = saved_state(folder, _STEPS), saved_state(told, _STEPS)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in told_tensors.items())
    assert state == told_state.model_copy(update={"num_rollbacks": 1})

    # A stop that is asked for as the run rolls back waits for a step, since no checkpoint says yet what is skipped.
    stopped = runs.train("rollback-stopped", _spike(), stop_at=8, **logging)
    state, _ = saved_state(stopped, 7)
    assert (state.skipped_samples, state.num_rollbacks) == ([tuple(_CORRUPTED[0])], 1)
    runs.train("rollback-stopped", **logging)
    state, tensors = saved_state(stopped, _STEPS)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in told_tensors.items())
    assert state == told_state.model_copy(update={"num_rollbacks": 1})

    # Lines of steps that are trained again are written anew; the spike itself never is.
    every_step = runs.train("rollback-logged", _spike(step=9), faults=faults | {"rollback_skip_steps": 2})
    _assert_same_end(every_step, runs.train("told-two", data={"skip_samples": [[84, 108]]}, faults=_JUDGED))
    if runs.ranks.rank == 0:
        discarded = (every_step.path / "metrics.discarded.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in discarded] == [7, 8]
        assert [event["to_step"] for event in _events(every_step)["rollback"]] == [6]

    with pytest.raises(RunFailure, match="has rolled back 2 times before"):
        runs.train("rollback-all", _spike(num_steps=9), faults=faults | {"max_rollbacks": 2})
    first = runs.train("rollback-none", _spike(step=5), steps=6, checkpoint={"every_steps": 5}, faults=faults)
    if runs.ranks.rank == 0:
        assert [event["action"] for event in _events(first)["spike"]] == ["no_checkpoint"]


def _check_warn(runs: RunsInProcess, undisturbed: RunFolder) -> None:
    """By default a spike is only told, and a step that is not finite on one rank is skipped by all."""
    faults = {**_JUDGED}
    folder = runs.train("warn", [*_spike(step=6, kind="nan"), *_spike(step=9)], faults=faults)
    lines = read_metrics(folder.path)
    assert [line["train/skipped_steps"] for line in lines] == [0] * 5 + [1] * 5
    assert _curve(folder)[:5] == _curve(undisturbed)[:5]
    assert lines[5]["train/loss"] is None
    if runs.ranks.rank == 0:
        events = _events(folder)
        assert [(event["step"], event["samples"]) for event in events["nonfinite"]] == [(6, [[60, 72]])]
        (spike,) = events["spike"]
        assert (spike["step"], spike["action"], spike["samples"]) == (9, "none", [[96, 108]])
        assert spike["value"] > 100 * spike["median"]
        assert spike["deviations"] > spike["threshold"] == 50.0
        assert {"injected", "nonfinite", "spike"} == events.keys()
        # What was done on purpose says so.
        found = [(event["step"], event["fault"], event["rank"]) for event in events["injected"]]
        assert found == [(6, "nan", 1), (9, "spike", 1)]
        assert "nothing was done about it" in runs.console("warn")
    silent = runs.train("off", _spike(step=9), faults={"spike_policy": "off"})
    assert _events(silent).keys() == {"injected"}


def _spike_policy(ranks: Ranks, root: Path, corpus: Path) -> None:
    runs = RunsInProcess(ranks, root, corpus)
    undisturbed = runs.train("undisturbed", faults=_JUDGED)
    if ranks.rank == 0:
        assert _events(undisturbed) == {}
    # In two pieces, the second of which begins behind what is left out.
    for steps in (8, _STEPS):
        told = runs.train("told", steps=steps, data={"skip_samples": _CORRUPTED}, faults=_JUDGED)
    assert _curve(told)[:6] == _curve(undisturbed)[:6]
    assert _curve(told)[6] != _curve(undisturbed)[6]
    _check_told_later(runs, told)
    _check_too_many(runs)
    _check_skip(runs, told)
    _check_rollback(runs, told)
    _check_warn(runs, undisturbed)


@pytest.mark.timeout(300)
def test_bad_steps_are_notified_skipped_or_rolled_back(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    run_on_ranks(_spike_policy, 2, tmp_path, shared_corpus[0], timeout_s=280)


def _skip_under_every_engine(ranks: Ranks, root: Path, corpus: Path) -> None:
    runs = RunsInProcess(ranks, root, corpus)
    for backend, strategy in (
        ("torch", "ddp"),
        ("torch", "zero3"),
        ("deepspeed", "zero2"),
        ("deepspeed", "zero3"),
        ("accelerate", "ddp"),
    ):
        parallel, name = {"backend": backend, "strategy": strategy}, f"{backend}-{strategy}"
        told = runs.train(f"told-{name}", parallel=parallel, data={"skip_samples": _CORRUPTED}, faults=_JUDGED)
        for policy in ("skip", "rollback") if backend == "deepspeed" else ("skip",):
            faults = {"spike_policy": policy, **_JUDGED}
            _assert_same_end(runs.train(f"{policy}-{name}", _spike(), parallel=parallel, faults=faults), told)
    # The loss scale makes the spike's gradients overflow, and stays what it would be without it.
    scaled: dict[str, Any] = {"precision": {"compute": "fp16"}}
    told = runs.train("told-fp16", data={"skip_samples": _CORRUPTED}, faults=_JUDGED, **scaled)
    _assert_same_end(runs.train("fp16", _spike(), faults={"spike_policy": "skip", **_JUDGED}, **scaled), told)


@pytest.mark.timeout(300)
def test_every_engine_skips_samples_alike(tmp_path: Path, shared_corpus: tuple[Path, Path]) -> None:
    run_on_ranks(_skip_under_every_engine, 2, tmp_path, shared_corpus[0], timeout_s=280)
