"""Trackers: each step reaches them once, and none of them can hold up or end training."""

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, command_environment
from trainer.config import RunConfig, parse_config
from trainer.trackers import composite
from trainer.trackers.composite import Trackers, build_trackers
from trainer.trackers.wandb_tracker import WandbTracker, wandb_mode

SERVER = "https://wandb.example.org:8443"


class RecordingTracker:
    """A tracker that writes down what it is told; it can fail at a step, or wait for leave."""

    def __init__(self, name: str, fails_at: int = 0, leave: threading.Event | None = None) -> None:
        self.name = name
        self.told: list[Any] = []
        self._fails_at, self._leave = fails_at, leave

    def start(self) -> None:
        self.told.append("start")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._leave is not None:
            self._leave.wait()
        if step == self._fails_at:
            raise ConnectionError("no server")
        self.told.append((step, dict(metrics)))

    def finish(self, exit_code: int) -> None:
        self.told.append(f"finish {exit_code}")

    def state(self) -> dict[str, Any]:
        return {"run_id": self.name}


@pytest.fixture
def config() -> RunConfig:
    wandb = {"mode": "offline", "project": "tests", "tags": ["tiny", "two"]}
    values = {"name": "tracked", "steps": 6, "model": {"architecture": "llama"}, "tracking": {"wandb": wandb}}
    return parse_config(values, source="test")


def test_everything_arrives_in_order() -> None:
    tracker = RecordingTracker("one")
    trackers = Trackers([tracker])
    trackers.log(1, {"train/loss": 2.0})
    trackers.log(2, {"train/loss": 1.0})
    trackers.finish(75)
    assert tracker.told == ["start", (1, {"train/loss": 2.0}), (2, {"train/loss": 1.0}), "finish 75"]
    assert trackers.state() == {"one": {"run_id": "one"}}


def test_a_tracker_that_fails_is_left_out_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(composite.atexit, "register", lambda *arguments: ended.append(arguments))
    broken, whole = RecordingTracker("broken", fails_at=2), RecordingTracker("whole")
    warnings: list[str] = []
    trackers = Trackers([broken, whole], warnings.append)
    for step in (1, 2, 3):
        trackers.log(step, {})
    trackers.finish(0)
    assert warnings == ["broken failed and is left out from here on: no server"]
    assert broken.told == ["start", (1, {})]
    assert whole.told == ["start", (1, {}), (2, {}), (3, {}), "finish 0"]
    assert len(ended) == 1


def test_a_slow_tracker_does_not_hold_up_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composite, "MAX_WAITING", 4)
    leave = threading.Event()
    slow = RecordingTracker("slow", leave=leave)
    warnings: list[str] = []
    trackers = Trackers([slow], warnings.append)
    started = time.monotonic()
    for step in range(1, 101):
        trackers.log(step, {})
    assert time.monotonic() - started < 1
    assert len(warnings) == 1
    assert "cannot keep up" in warnings[0]
    leave.set()
    trackers.finish(0)
    steps = [entry[0] for entry in slow.told if isinstance(entry, tuple)]
    assert steps == sorted(steps)
    assert 4 <= len(steps) <= 6
    assert slow.told[-1] == "finish 0"


def test_a_run_ends_in_time_and_with_its_own_status_when_a_tracker_never_returns() -> None:
    script = """
import atexit, sys, time
# As wandb does, when its server does not answer.
atexit.register(time.sleep, 60)
from trainer.trackers import composite

class Stuck:
    name = "stuck"
    def start(self):
        time.sleep(60)

composite.FINISH_TIMEOUT_S = 0.5
trackers = composite.Trackers([Stuck()], print)
trackers.log(1, {})
trackers.finish(75)
sys.stdout.flush()
sys.exit(75)
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
    assert finished.stdout == "trackers did not finish within 0.5 s; what they lack is in metrics.jsonl\n"


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
    trackers = build_trackers(off, tmp_path)
    trackers.finish(0)
    assert trackers.state() == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(120)
def test_wandb_gets_each_step_once_over_two_attempts(config: RunConfig, tmp_path: Path) -> None:
    first = WandbTracker(config, tmp_path)
    first.start()
    for step in (1, 2, 3, 4):
        first.log(step, {"train/loss": 5.0 - step, "throughput/mfu": None})
    first.finish(1)
    # wandb names an attempt's folder by the second.
    time.sleep(1.1)
    # It was killed and goes on from the checkpoint of step 2: steps 3 and 4 are taken once more.
    second = WandbTracker(config, tmp_path)
    second.start()
    for step in (3, 4, 5, 6):
        second.log(step, {"train/loss": 5.0 - step})
    second.finish(75)
    assert second.state() == first.state()

    records = [_read_wandb_file(path) for path in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))]
    assert [_sent_steps(part) for part in records] == [[1, 2, 3, 4], [5, 6]]
    for part in records:
        (run,) = [record.run for record in part if record.WhichOneof("record_type") == "run"]
        assert run.run_id == first.state()["run_id"]
        assert (run.project, run.display_name, list(run.tags)) == ("tests", "tracked", ["tiny", "two"])
        values = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert values["model"]["architecture"] == "llama"
        axes = {record.metric.step_metric or record.metric.name for record in part if record.HasField("metric")}
        assert axes == {"step"}
    history = next(record.history for record in records[0] if record.HasField("history"))
    logged = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
    assert logged["train/loss"] == 4.0
    assert "throughput/mfu" not in logged


@pytest.mark.timeout(120)
def test_a_missing_key_is_a_warning_and_never_a_question(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    online = parse_config(config.model_dump() | {"tracking": {"wandb": {"mode": "online"}}}, source="test")
    warnings: list[str] = []
    trackers = build_trackers(online, tmp_path, warnings.append)
    trackers.log(1, {"train/loss": 1.0})
    trackers.finish(0)
    assert len(warnings) == 1
    assert "there is no key" in warnings[0]
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert _sent_steps(_read_wandb_file(path)) == [1]


def test_a_wandb_that_cannot_be_imported(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(composite.atexit, "register", lambda *_: None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING, logger="shardline"):
        trackers = build_trackers(config, tmp_path)
        trackers.log(1, {"train/loss": 1.0})
        trackers.finish(0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].startswith("wandb failed and is left out from here on: ")


def _sent_steps(records: list[Any]) -> list[int]:
    histories = [record.history for record in records if record.HasField("history")]
    values = [{item.key or item.nested_key[0]: item.value_json for item in history.item} for history in histories]
    return [int(value["step"]) for value in values]


def _read_wandb_file(path: Path) -> list[Any]:
    """The records of a wandb file: after a header, LevelDB's log format with protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    return [Record.FromString(data) for data in _read_log(path.read_bytes())]


def _read_log(content: bytes) -> Iterator[bytes]:
    position, block, message = 7, 1 << 15, b""
    while position + 7 <= len(content):
        if block - position % block < 7:
            position += block - position % block
            continue
        size, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        message += content[position + 7 : position + 7 + size]
        position += 7 + size
        # Whole, or the last piece.
        if kind in (1, 4):
            yield message
            message = b""
