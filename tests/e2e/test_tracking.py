"""One run over three attempts, one of them killed: every logged step is with each tracker once, and can be joined."""

import importlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.stand_in_wandb import StandInServer, StoredRun, stand_in_server
from tests.support import (
    ROOT,
    kill,
    rank_processes,
    read_metrics,
    shardline,
    start_shardline,
    tiny_values,
    trained,
    training_curve,
    wait_until,
    write_config,
)
from tests.wandb_history import history_values
from trainer.metrics.goodput import Category
from trainer.run_folder.folder import RunFolder
from trainer.trackers.wandb_files import WandbPart, read_parts, read_records
from trainer.trackers.wandb_tracker import WandbIdentity

# Of a machine that is busy with other things.
_PATIENCE_S = 240


def _parts(run_dir: Path) -> list[WandbPart]:
    identity = WandbIdentity.read(run_dir)
    return [] if identity is None else read_parts(run_dir, identity.run_id)


def _last_step(run_dir: Path) -> int:
    return int(read_metrics(run_dir)[-1]["step"])


def _replays(run_dir: Path) -> bool:
    """Whether steps are on wandb's disk that the next attempt takes again."""
    newest = RunFolder(run_dir).newest_checkpoint()
    return newest is not None and any(part.last_step > newest[0] + 2 for part in _parts(run_dir))


@contextmanager
def _started(config: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run in the background, which does not outlive a test that fails."""
    launcher = start_shardline("run", config, "--nproc-per-node", 2, log=log)
    try:
        yield launcher
    finally:
        launcher.kill()
        launcher.wait()


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, shared_corpus: tuple[Path, Path]) -> Path:
    """A run that was killed, continued, stopped, and continued to its end; returns its folder."""
    corpus, cache = shared_corpus
    root = tmp_path_factory.mktemp("tracked")
    values = tiny_values(root / "runs", cache, corpus)
    values |= {
        "name": "tracked",
        "steps": 4000,
        "checkpoint": {"every_steps": 50},
        "evaluation": {"every_steps": 20, "max_sequences": 2},
        "tracking": {"wandb": {"mode": "offline", "project": "tests"}, "tensorboard": {"enabled": True}},
    }
    config, run_dir = write_config(root / "tracked.yaml", values), root / "runs" / "tracked"

    # Else importing wandb would take as long as the moment that is waited for.
    importlib.import_module("wandb")
    with _started(config, root / "killed.log") as launcher:
        wait_until(lambda: _replays(run_dir), _PATIENCE_S, what="steps of wandb beyond the checkpoint")
        kill(rank_processes(run_dir)[0])
        assert launcher.wait(_PATIENCE_S) == 1

    (part,) = _parts(run_dir)
    with _started(config, log := root / "stopped.log") as launcher:
        wait_until(lambda: "continuing after step" in log.read_text(), _PATIENCE_S, what="continuation")
        wait_until(lambda: _last_step(run_dir) > part.last_step + 2, _PATIENCE_S, what="steps that are new to wandb")
        (run_dir / "stop").touch()
        assert launcher.wait(_PATIENCE_S) == 75

    trained(shardline("run", config, f"steps={_last_step(run_dir) + 5}", "--nproc-per-node", 2))
    assert (run_dir / "metrics.discarded.jsonl").exists()
    return run_dir


@pytest.mark.timeout(900)
def test_wandbs_offline_files_hold_every_logged_step_once(tracked: Path) -> None:
    logged = {line["step"]: line for line in read_metrics(tracked)}
    assert list(logged) == list(range(1, len(logged) + 1))
    parts = _parts(tracked)
    assert [part.attempt for part in parts] == [1, 2, 3]
    assert [step for part in parts for step in part.steps] == list(logged)
    found: dict[int, dict[str, Any]] = {}
    for part in parts:
        for record, _ in read_records(part.file):
            if record.HasField("history"):
                values = history_values(record.history)
                found[values["step"]] = values
    # Also where a step was taken twice, since it is the same step.
    for name in ("train/loss", "train/grad_norm", "train/tokens"):
        assert [found[step][name] for step in logged] == [line[name] for line in logged.values()]
    summary: dict[str, Any] = {}
    for record, _ in read_records(parts[-1].file):
        if record.HasField("summary"):
            summary |= {item.key: json.loads(item.value_json) for item in record.summary.update}
    evaluations = {step: line["eval/loss"] for step, line in logged.items() if "eval/loss" in line}
    best_step = min(evaluations, key=evaluations.__getitem__)
    assert summary["summary/outcome"] == "finished"
    assert summary["summary/final_loss"] == logged[len(logged)]["train/loss"]
    assert summary["summary/tokens"] == logged[len(logged)]["train/tokens"]
    assert (summary["summary/best_eval_step"], summary["summary/best_eval_loss"]) == (best_step, evaluations[best_step])
    # Three attempts, one of them killed.
    shares = {name: summary[f"goodput/{name}_fraction"] for name in Category}
    assert sum(shares.values()) == pytest.approx(1)
    assert all(shares[name] > 0 for name in ("training", "startup"))
    assert shares["down"] == 0


def test_tensorboard_shows_every_logged_step_once(tracked: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    lines = read_metrics(tracked)
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [line["step"] for line in lines]
    assert [event.value for event in losses] == pytest.approx([line["train/loss"] for line in lines], rel=1e-6)


def test_each_line_tells_shares_of_time_and_use_of_the_node(tracked: Path) -> None:
    lines = read_metrics(tracked)
    for line in lines:
        shares = [value for name, value in line.items() if name.startswith("time/")]
        assert sum(shares) == pytest.approx(1.0)
    assert max(line["time/evaluation_fraction"] for line in lines) > 0
    # Of the step after the one that was saved; the killed attempt had some of these.
    discarded = (tracked / "metrics.discarded.jsonl").read_text().splitlines()
    assert max(line["time/saving_fraction"] for line in (*lines, *map(json.loads, discarded))) > 0
    # Both ranks are on one node.
    names = {name for name in lines[-1] if name.startswith("system/")}
    assert names == {"system/node-0/cpu_percent", "system/node-0/memory_percent"}


@pytest.fixture
def server() -> Iterator[StandInServer]:
    with stand_in_server() as server:
        yield server


def test_sync_shows_the_parts_and_asks_for_a_key_in_one_sentence(tracked: Path, server: StandInServer) -> None:
    no_key = {"NETRC": str(tracked / "none"), "WANDB_BASE_URL": server.url, "COLUMNS": "200"}
    shown = shardline("tracking", "sync", tracked, "--dry-run", **no_key)
    assert shown.returncode == 0, shown.stderr
    parts = _parts(tracked)
    for part in parts:
        (row,) = [line for line in shown.stdout.splitlines() if "│" in line and part.file.parent.name in line]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[:3] == [str(part.attempt), f"{part.steps[0]}-{part.steps[-1]}", str(len(part.steps))]
        assert cells[3].startswith("waits")
    commands = [line for line in shown.stdout.splitlines() if " -m wandb sync --id=" in line]
    assert [command.rpartition("/")[2] for command in commands] == [part.file.parent.name for part in parts]
    refused = shardline("tracking", "sync", tracked, **no_key)
    assert refused.returncode == 2
    (sentence,) = refused.stderr.strip().splitlines()
    assert sentence.startswith(f"error: there is no wandb key for {server.url}; set WANDB_API_KEY")
    assert server.runs == {}


@pytest.mark.timeout(400)
def test_sync_joins_all_parts_into_one_run_and_nothing_twice(
    tracked: Path, tmp_path: Path, server: StandInServer
) -> None:
    copy = shutil.copytree(tracked, tmp_path / "copy", symlinks=True)
    steps = [line["step"] for line in read_metrics(copy)]
    server.refuses = True
    failed = shardline("tracking", "sync", copy, **server.environment)
    assert failed.returncode == 1
    (sentence,) = failed.stderr.strip().splitlines()
    assert sentence.startswith("error: nothing was uploaded; wandb says: ")
    server.refuses = False
    # An upload that broke off in the middle of the first part has left this.
    assert _parts(copy)[0].last_step > 30
    history = {step - 1: {"step": step, "_step": step} for step in range(1, 31)}
    server.runs[WandbIdentity.read(copy).run_id] = run = StoredRun(history)  # type: ignore[union-attr]
    for _ in range(2):
        finished = shardline("tracking", "sync", copy, **server.environment)
        assert finished.returncode == 0, finished.stderr
        assert server.environment["WANDB_API_KEY"] not in finished.stdout + finished.stderr
        assert list(server.runs.values()) == [run]
        assert run.steps == steps
        assert [line["_step"] for _, line in sorted(run.history.items())] == steps
        assert run.summary["summary/outcome"] == "finished"
    assert "nothing to upload" in finished.stdout
    # wandb's own logs are with the run, not where the command was started.
    assert list(copy.glob("wandb/logs/debug-sync*.log"))
    assert not (ROOT / "wandb").exists()


def test_the_dashboard_plots_what_training_logs(tracked: Path, server: StandInServer) -> None:
    shown = shardline("tracking", "dashboard", tracked, NETRC=str(tracked / "none"))
    assert shown.returncode == 0, shown.stderr
    workspace = json.loads(shown.stdout)
    assert workspace["project"] == "tests"
    sections = workspace["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [
        "Loss",
        "Evaluation",
        "Learning rate and gradient norm",
        "Throughput",
        "Memory",
        "Time shares",
        "System",
    ]
    panels = [panel for section in sections for panel in section["panels"]]
    plots = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    # The confusion matrix is no curve.
    assert len(plots) == len(panels) - 1
    assert all(plot["xAxis"] == "step" for plot in plots)
    # An attempt that ends before its first write in the background is made valid has no line with the time of one.
    by_chance = {"checkpoint/write_s"}
    logged = {name for line in read_metrics(tracked) for name in line} - by_chance
    plotted = {name for plot in plots for name in plot["metrics"]} - by_chance
    assert plotted
    by_setting = {"train/loss_scale", "train/noise_scale_tokens", "train/sparsity"}
    by_setting |= {f"eval/ema_{name}" for name in ("loss", "perplexity", "bits_per_byte")}
    # Of other tasks.
    by_setting |= {
        f"eval/{average}{name}"
        for average in ("", "ema_")
        for name in ("accuracy", "f1_macro", "auroc", "mse", "mae", "r2")
    }
    by_setting |= {"eval/precision_macro", "eval/recall_macro", "eval/f1_micro"}
    assert plotted - logged == by_setting
    prefixes = ("train/", "eval/", "throughput/", "memory/", "time/", "checkpoint/", "goodput/")
    assert {name for name in logged if name.startswith(prefixes)} - {
        "train/tokens",
        "throughput/data_wait_fraction",
        # The number of a rank is no curve; its ratio is plotted.
        "throughput/slowest_rank",
    } == plotted - by_setting

    saved = shardline("tracking", "dashboard", tracked, "--save", **server.environment)
    assert saved.returncode == 0, saved.stderr
    (view,) = server.views
    assert (view["projectName"], view["entityName"]) == ("tests", "tester")
    assert json.loads(view["spec"])["section"]["panelBankConfig"]["sections"][0]["name"] == "Loss"
    refused = shardline("tracking", "dashboard", "--save", NETRC=str(tracked / "none"), WANDB_BASE_URL=server.url)
    assert refused.returncode == 2
    (sentence,) = refused.stderr.strip().splitlines()
    assert sentence.startswith(f"error: there is no wandb key for {server.url}; set WANDB_API_KEY")


def test_a_server_that_refuses_is_said_and_training_goes_on(config_file: Path) -> None:
    runs = config_file.parent / "runs"
    alone = ("run", config_file, "parallel.strategy=none", "--nproc-per-node=1", "steps=4")
    trained(shardline(*alone, "name=untracked"))
    # The discard port of this machine: every connection is refused.
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "2"}
    finished = shardline(*alone, "name=away", "tracking.wandb.mode=online", **away)
    trained(finished)
    said = finished.stdout + finished.stderr
    assert any("wandb" in line and "warning" in line for line in said.splitlines()), said
    assert training_curve(runs / "away") == training_curve(runs / "untracked")
