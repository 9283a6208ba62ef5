"""Trackers: each step reaches them once, and none of them can hold up or end training."""

import contextlib
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sharding.ranks.errors import UserError
from tests.stand_in_wandb import stand_in_server
from tests.support import ROOT, command_environment, wait_until
from tests.wandb_history import history_values
from trainer.config import RunConfig, config_to_yaml, parse_config, tracking
from trainer.config.rules import World, validate
from trainer.metrics.best import record_directions
from trainer.metrics.class_table import write_class_table
from trainer.metrics.file import MetricsFile
from trainer.tasks.scores import ClassScores
from trainer.tasks.task import ClassTable
from trainer.trackers.composite import Trackers, build_trackers
from trainer.trackers.tensorboard_tracker import TensorBoardTracker
from trainer.trackers.wandb_files import read_parts, read_records
from trainer.trackers.wandb_tracker import WandbTracker, wandb_mode

SERVER = "https://wandb.example.org:8443"


class RecordingTracker:
    """A tracker that writes down what it is told; it can fail at a step, or wait for leave."""

    def __init__(self, name: str, fails_at: int = 0, leave: threading.Event | None = None) -> None:
        self.name = name
        self.told: list[Any] = []
        self._fails_at, self._leave = fails_at, leave

    def start(self, step: int) -> None:
        self.told.append(f"start {step}")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._leave is not None:
            self._leave.wait()
        if step == self._fails_at:
            raise ConnectionError("no server")
        self.told.append((step, dict(metrics)))

    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        self.told.append((f"finish {exit_code}", dict(summary)))

    def state(self) -> dict[str, Any]:
        return {"run_id": self.name}


def _drop_time(summary: dict[str, Any]) -> dict[str, Any]:
    assert 0 <= summary.pop("summary/attempt_wall_time_s") < 60
    return summary


@pytest.fixture
def metrics_file(tmp_path: Path) -> Iterator[MetricsFile]:
    file = MetricsFile(tmp_path / "metrics.jsonl", last_step=0)
    yield file
    file.close()


@pytest.fixture
def write(tmp_path: Path, metrics_file: MetricsFile) -> Callable[..., None]:
    """Write a step's line as training does, and tell the trackers."""

    def write_line(trackers: Trackers, step: int, **metrics: Any) -> None:
        metrics_file.write(step, {name.replace("_", "/", 1): value for name, value in metrics.items()})
        trackers.announce()

    return write_line


@pytest.fixture
def config() -> RunConfig:
    wandb = {
        "mode": "offline",
        "project": "tests",
        "tags": ["tiny", "two"],
        "group": "small",
        "notes": "for a test",
    }
    tracking = {"wandb": wandb, "trackio": {"project": "tests"}}
    values = {"name": "tracked", "steps": 6, "model": {"architecture": "llama"}, "tracking": tracking}
    return parse_config(values, source="test")


Write = Callable[..., None]


def test_everything_arrives_in_order(tmp_path: Path, write: Write) -> None:
    tracker = RecordingTracker("one")
    trackers = Trackers([tracker], tmp_path / "metrics.jsonl")
    assert trackers.state() == {}
    write(trackers, 1, train_loss=2.0, eval_loss=1.5, train_tokens=10)
    trackers.start(1)
    write(trackers, 2, train_loss=float("nan"), eval_loss=1.25, train_tokens=20)
    write(trackers, 3, train_loss=1.0, eval_loss=1.75, train_tokens=30)
    trackers.finish(75)
    *told, (finish, summary) = tracker.told
    assert told == [
        "start 1",
        (1, {"train/loss": 2.0, "eval/loss": 1.5, "train/tokens": 10}),
        (2, {"train/loss": None, "eval/loss": 1.25, "train/tokens": 20}),
        (3, {"train/loss": 1.0, "eval/loss": 1.75, "train/tokens": 30}),
    ]
    assert finish == "finish 75"
    assert _drop_time(summary) == {
        "summary/final_loss": 1.0,
        "summary/final_eval_loss": 1.75,
        "summary/best_eval_loss": 1.25,
        "summary/best_eval_step": 2,
        "summary/tokens": 30,
        "summary/outcome": "stopped",
    }
    assert trackers.state() == {"one": {"run_id": "one"}}


def test_the_summary_is_by_what_the_run_is_judged_by(tmp_path: Path, write: Write) -> None:
    tracker = RecordingTracker("one")
    trackers = Trackers([tracker], tmp_path / "metrics.jsonl", monitor="accuracy")
    record_directions(tmp_path, {"loss": "lower", "accuracy": "higher"})
    for step, (loss, accuracy) in enumerate([(1.0, 0.5), (2.0, 0.75), (3.0, 0.25)], 1):
        write(trackers, step, eval_loss=loss, eval_accuracy=accuracy)
    trackers.start(3)
    trackers.finish(0)
    _, summary = tracker.told[-1]
    assert _drop_time(summary) == {
        "summary/final_eval_accuracy": 0.25,
        "summary/best_eval_accuracy": 0.75,
        "summary/best_eval_step": 2,
        "summary/outcome": "finished",
    }


def test_a_tracker_that_fails_is_left_out_with_one_warning(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, whole = RecordingTracker("broken", fails_at=2), RecordingTracker("whole")
    warnings: list[str] = []
    trackers = Trackers([broken, whole], tmp_path / "metrics.jsonl", warnings.append)
    trackers.start(0)
    for step in (1, 2, 3):
        write(trackers, step)
    trackers.finish(0)
    assert warnings == ["broken failed and is left out from here on: no server"]
    assert broken.told == ["start 0", (1, {})]
    assert whole.told[:-1] == ["start 0", (1, {}), (2, {}), (3, {})]


@pytest.mark.timing
def test_a_slow_tracker_holds_up_neither_training_nor_another_and_lacks_nothing(tmp_path: Path, write: Write) -> None:
    leave = threading.Event()
    slow, quick = RecordingTracker("slow", leave=leave), RecordingTracker("quick")
    trackers = Trackers([slow, quick], tmp_path / "metrics.jsonl")
    trackers.start(0)
    started = time.monotonic()
    for step in range(1, 2001):
        write(trackers, step)
    assert time.monotonic() - started < 5
    wait_until(lambda: len(quick.told) == 2001, what="all steps at the quick one")
    assert slow.told == ["start 0"]
    leave.set()
    trackers.finish(0)
    assert [entry[0] for entry in slow.told[1:]] == [*range(1, 2001), "finish 0"]


def test_half_a_line_is_left_until_it_is_whole(tmp_path: Path) -> None:
    tracker = RecordingTracker("one")
    trackers = Trackers([tracker], tmp_path / "metrics.jsonl")
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.write('{"step": 1, "a": 1}\n{"step": 2, ')
        file.flush()
        trackers.start(0)
        wait_until(lambda: len(tracker.told) == 2, what="the first line")
        file.write('"a": 2}\n')
    trackers.announce()
    trackers.finish(0)
    assert tracker.told[1:-1] == [(1, {"a": 1}), (2, {"a": 2})]


def test_a_run_that_rolls_back_puts_another_file_in_place(tmp_path: Path) -> None:
    path, tracker = tmp_path / "metrics.jsonl", RecordingTracker("one")
    first = MetricsFile(path, last_step=0)
    trackers = Trackers([tracker], path)
    trackers.start(0)
    for step in (1, 2, 3):
        first.write(step, {"a": 1})
    trackers.announce()
    wait_until(lambda: len(tracker.told) == 4, what="the first lines")
    first.close()
    second = MetricsFile(path, last_step=1)
    trackers.announce()
    second.write(2, {"a": 2})
    trackers.announce()
    trackers.finish(0)
    second.close()
    # Trackers send a step once; which lines there are is for the file to say.
    assert tracker.told[4:-1] == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.timing
def test_a_run_ends_in_time_and_with_its_own_status_when_a_tracker_never_returns() -> None:
    script = """
import atexit, time
# As wandb does, when its server does not answer.
atexit.register(time.sleep, 60)
from trainer.runtime.processes import end_process
from trainer.trackers import composite

class Stuck:
    name = "stuck"
    def start(self, step):
        time.sleep(60)

composite.FINISH_TIMEOUT_S = 0.5
trackers = composite.Trackers([Stuck()], None, print)
trackers.start(0)
trackers.announce()
trackers.finish(75)
end_process(75)
"""
    finished = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=ROOT,
        env=command_environment(),
        check=False,
    )
    assert finished.returncode == 75, finished.stderr
    assert finished.stdout == "stuck did not finish within 0.5 s; what is lacking there is in metrics.jsonl\n"


@pytest.mark.parametrize(
    ("configured", "environment", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_IDENTITY_TOKEN_FILE": "f"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_MODE": "online"}, "offline"),
        ("online", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "online"),
        ("online", {}, "offline"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
    ],
)
def test_mode(configured: str, environment: dict[str, str], mode: str, tmp_path: Path) -> None:
    assert wandb_mode(configured, {"NETRC": str(tmp_path / "none"), **environment}, SERVER) == mode


def test_a_netrc_entry_of_that_server_is_a_key(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine wandb.example.org:8443\n  login user\n  password key\n")
    netrc.chmod(0o600)
    assert wandb_mode("auto", {"NETRC": str(netrc)}, SERVER) == "online"
    assert wandb_mode("auto", {"NETRC": str(netrc)}, "https://other.example.org") == "offline"
    netrc.write_text("machine\n")
    assert wandb_mode("auto", {"NETRC": str(netrc)}, SERVER) == "offline"


def test_disabled_means_no_tracker(config: RunConfig, tmp_path: Path) -> None:
    off = parse_config(config.model_dump() | {"tracking": {"wandb": {"mode": "disabled"}}}, source="test")
    trackers = build_trackers(off, tmp_path, tmp_path / "metrics.jsonl")
    trackers.start(0)
    trackers.finish(0)
    assert trackers.state() == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(120)
def test_wandb_gets_each_step_once_over_two_attempts(config: RunConfig, tmp_path: Path) -> None:
    first = WandbTracker(config, tmp_path)
    first.start(0)
    for step in (1, 2, 3, 4):
        first.log(step, {"train/loss": 5.0 - step, "throughput/mfu": None})
    first.finish(1, {"summary/outcome": "failed"})
    # wandb names an attempt's folder by the second.
    time.sleep(1.1)
    # It was killed and goes on from the checkpoint of step 2: steps 3 and 4 are taken once more.
    second = WandbTracker(config, tmp_path)
    second.start(2)
    for step in (1, 2, 3, 4, 5, 6):
        second.log(step, {"train/loss": 5.0 - step})
    second.finish(75, {"summary/outcome": "stopped", "summary/tokens": 60})
    assert second.state() == first.state()

    parts = read_parts(tmp_path, first.state()["run_id"])
    assert [part.steps for part in parts] == [(1, 2, 3, 4), (5, 6)]
    assert [(part.is_offline, part.is_synced, part.is_torn) for part in parts] == [(True, False, False)] * 2
    records = [[record for record, _ in read_records(part.file)] for part in parts]
    for part in records:
        (run,) = [record.run for record in part if record.WhichOneof("record_type") == "run"]
        assert run.run_id == first.state()["run_id"]
        assert (run.project, run.display_name, list(run.tags)) == ("tests", "tracked", ["tiny", "two"])
        assert (run.run_group, run.notes) == ("small", "for a test")
        values = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert values["model"]["architecture"] == "llama"
        axes = {record.metric.step_metric or record.metric.name for record in part if record.HasField("metric")}
        assert axes == {"step"}
    histories = [[record.history for record in part if record.HasField("history")] for part in records]
    logged = history_values(histories[0][0])
    assert logged["train/loss"] == 4.0
    assert "throughput/mfu" not in logged
    # wandb's own counter does not start again, so that joined parts do not overlap.
    assert [history.step.num for part in histories for history in part] == [1, 2, 3, 4, 5, 6]
    summary = {
        item.key: json.loads(item.value_json)
        for record in records[1]
        if record.HasField("summary")
        for item in record.summary.update
    }
    assert (summary["summary/outcome"], summary["summary/tokens"]) == ("stopped", 60)


@pytest.mark.timeout(120)
def test_wandb_gets_the_confusion_matrix_of_the_last_evaluation(config: RunConfig, tmp_path: Path) -> None:
    table = ClassTable(("cat", "dog"), [ClassScores(0.75, 0.6, 0.667, 5, 4)] * 2, [[3, 2], [1, 2]])
    write_class_table(tmp_path, 2, table)
    tracker = WandbTracker(config, tmp_path)
    tracker.start(0)
    tracker.log(2, {"eval/accuracy": 0.625})
    tracker.finish(0, {})
    (file,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/confusion_matrix*.json")
    values = json.loads(file.read_text())
    assert (values["columns"], values["data"]) == (["class", "cat", "dog"], [["cat", 3, 2], ["dog", 1, 2]])


def test_what_a_kill_kept_from_the_disk_is_sent_again(config: RunConfig, tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from trainer.config import load_config
from trainer.trackers.wandb_tracker import WandbTracker

tracker = WandbTracker(load_config(sys.argv[1]), Path(sys.argv[2]))
tracker.start(0)
for step in range(1, 101):
    tracker.log(step, {"train/loss": 1 / step})
os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    killed = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "run.yaml", tmp_path],
        timeout=60,
        cwd=ROOT,
        env=command_environment(),
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    time.sleep(1.1)
    tracker = WandbTracker(config, tmp_path)
    tracker.start(100)
    for step in range(1, 111):
        tracker.log(step, {"train/loss": 1 / step})
    tracker.finish(0, {})
    before, after = read_parts(tmp_path, tracker.state()["run_id"])
    assert before.steps + after.steps == tuple(range(1, 111))
    if len(before.steps) == 100:
        pytest.skip("wandb's process had written all of it before the kill, so nothing had to be sent again")


_ONLINE_ATTEMPT = """
import os, signal, sys, time
from pathlib import Path
from trainer.config import load_config
from trainer.trackers import wandb_tracker
from trainer.trackers.wandb_tracker import WandbTracker

first, last, ending = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
if ending == "away":
    wandb_tracker.FINISH_TIMEOUT_S = 2.0
tracker = WandbTracker(load_config(sys.argv[1], ["tracking.wandb.mode=online"]), Path(sys.argv[2]), print)
tracker.start(first)
for step in range(1, last + 1):
    tracker.log(step, {"train/loss": 1 / step})
    while step == first and not Path(sys.argv[2], "go").exists():
        time.sleep(0.1)
if ending == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
tracker.finish(0, {})
"""


@pytest.mark.timeout(300)
def test_online_a_killed_attempts_unsent_steps_are_sent_and_none_twice(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    with stand_in_server() as server:
        environment = command_environment(WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL="1", **server.environment)

        def attempt(first: int, last: int, ending: str) -> subprocess.Popen[str]:
            arguments = [tmp_path / "run.yaml", tmp_path, str(first), str(last), ending]
            command = [sys.executable, "-c", _ONLINE_ATTEMPT, *arguments]
            return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)

        with attempt(20, 60, "kill") as killed, contextlib.ExitStack() as at_the_end:
            at_the_end.callback(killed.kill)
            wait_until(lambda: any(len(run.steps) >= 20 for run in server.runs.values()), what="the first lines")
            # Nothing that comes from now on arrives.
            server.refuses = True
            (tmp_path / "go").touch()
            assert killed.wait(60) == -signal.SIGKILL
        (run,) = server.runs.values()
        assert run.steps == list(range(1, 21))
        server.refuses = False
        # From a checkpoint of step 40.
        for first, last in ((40, 70), (70, 75)):
            with attempt(first, last, "finish") as finished:
                said, _ = finished.communicate(timeout=100)
            assert (finished.returncode, said) == (0, "")
            assert list(server.runs.values()) == [run]
            assert run.steps == list(range(1, last + 1))


@pytest.mark.timeout(120)
def test_a_server_that_is_away_at_the_end_holds_no_process(config: RunConfig, tmp_path: Path) -> None:
    """One that ends as Python ends, by wandb's own hook."""
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    with contextlib.ExitStack() as at_the_end:
        with stand_in_server() as server:
            environment = command_environment(WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL="1", **server.environment)
            command = [sys.executable, "-c", _ONLINE_ATTEMPT, tmp_path / "run.yaml", tmp_path, "2", "6", "away"]
            process = at_the_end.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
            )
            at_the_end.callback(process.kill)
            wait_until(lambda: any(run.steps for run in server.runs.values()), what="the first lines")
        # Nobody listens there any more.
        (tmp_path / "go").touch()
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said == "wandb did not finish within 2 s; what is lacking is in metrics.jsonl\n"


@pytest.mark.timeout(120)
def test_an_artifact_holds_the_run_without_its_tensors(config: RunConfig, tmp_path: Path) -> None:
    values = config.model_dump()
    values["tracking"]["wandb"]["artifacts"] = True
    tracker = WandbTracker(parse_config(values, source="test"), tmp_path)
    tracker.start(0)
    names = {"config.yaml", "provenance.json", "metrics.jsonl", "checkpoints/step-00000002/manifest.json"}
    for name in (*names, "checkpoints/step-00000001/manifest.json", "checkpoints/step-00000002/rank-0.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    tracker.finish(0, {})
    (part,) = read_parts(tmp_path, tracker.state()["run_id"])
    artifacts = [record.artifact for record, _ in read_records(part.file) if record.HasField("artifact")]
    assert [{entry.path for entry in artifact.manifest.contents} for artifact in artifacts] == [names]


@pytest.mark.timeout(120)
def test_tensorboard_has_each_step_once_and_as_in_metrics_jsonl(config: RunConfig, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = TensorBoardTracker(config, tmp_path)
    killed.start(0)
    for step in (1, 2, 3, 4):
        killed.log(step, {"train/loss": 10.0 + step, "throughput/mfu": None})
    # TensorBoard orders files by the second in their names.
    time.sleep(1.1)
    # From the checkpoint of step 2; what is taken again has other values here.
    second = TensorBoardTracker(config, tmp_path)
    second.start(2)
    for step in (1, 2, 3, 4, 5):
        second.log(step, {"train/loss": 20.0 + step})
    second.finish(0, {"summary/outcome": "finished"})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0), (5, 25.0)]
    (summary,) = events.Tensors("summary/text_summary")
    assert b"| summary/outcome | finished |" in summary.tensor_proto.string_val[0]


_TRACKIO_ATTEMPT = """
import os, signal, sys, time
from pathlib import Path
from trainer.config import load_config
from trainer.trackers.trackio_tracker import TrackioTracker

tracker = TrackioTracker(load_config(sys.argv[1]), Path(sys.argv[2]))
tracker.start(0)
for step in range(1, int(sys.argv[3]) + 1):
    tracker.log(step, {"train/loss": 1 / step, "throughput/mfu": None})
    if step == 4:
        time.sleep(1.5)
if len(sys.argv) > 4:
    os.kill(os.getpid(), signal.SIGKILL)
tracker.finish(0, {})
from trackio.sqlite_storage import SQLiteStorage
logs = SQLiteStorage.get_logs("tests", "tracked")
print(SQLiteStorage.get_runs("tests"), [(log["step"], log["train/loss"] * log["step"]) for log in logs])
"""


@pytest.mark.timeout(180)
def test_trackio_has_each_step_once_after_a_kill_and_asks_nobody(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))

    def attempt(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", _TRACKIO_ATTEMPT, tmp_path / "run.yaml", tmp_path, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            # Each would lead somewhere else than to this folder.
            env=command_environment(TRACKIO_SPACE_ID="someone/space", HF_TOKEN="hf_none", HF_ENDPOINT="http://[::1]:9"),
            check=False,
        )

    killed = attempt("7", "kill")
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "")
    for last in (9, 12):
        finished = attempt(str(last))
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout == f"['tracked'] {[(step, 1.0) for step in range(1, last + 1)]}\n"
    assert (tmp_path / "trackio" / "tests.db").exists()


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_missing_package_is_said_before_anything_starts(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    world = World(num_ranks=1, has_gpu=False)
    values = config.model_dump()
    values["tracking"][name]["enabled"] = True
    wanted = parse_config(values, source="test")
    validate(wanted, world)
    monkeypatch.setattr(tracking, "find_spec", lambda package: None)
    validate(config, world)
    with pytest.raises(UserError, match=rf"tracking\.{name}\.enabled=true needs the package {name}, .*pip install"):
        validate(wanted, world)


@pytest.mark.timeout(120)
def test_a_missing_key_is_a_warning_and_never_a_question(
    config: RunConfig, tmp_path: Path, metrics_file: MetricsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    online = parse_config(config.model_dump() | {"tracking": {"wandb": {"mode": "online"}}}, source="test")
    warnings: list[str] = []
    metrics_file.write(1, {"train/loss": 1.0})
    trackers = build_trackers(online, tmp_path, tmp_path / "metrics.jsonl", warnings.append)
    trackers.start(0)
    trackers.finish(0)
    assert len(warnings) == 1
    assert "there is no key" in warnings[0]
    (part,) = read_parts(tmp_path, trackers.state()["wandb"]["run_id"])
    assert (part.steps, part.is_offline) == ((1,), True)


def test_a_wandb_that_cannot_be_imported(
    config: RunConfig,
    tmp_path: Path,
    metrics_file: MetricsFile,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING, logger="shardline"):
        metrics_file.write(1, {"train/loss": 1.0})
        trackers = build_trackers(config, tmp_path, tmp_path / "metrics.jsonl")
        trackers.start(0)
        trackers.finish(0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].startswith("wandb failed and is left out from here on: ")
