"""Training from Python on one rank: the same as ``python -m trainer``, in a process that goes on afterwards."""

import atexit
import json
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardline
from shardline import Run, UserError, train
from tests.shardline.own_parts import Clumsy, Halved, Listener, Network, Points, settings
from tests.support import run_module, trained, training_curve, write_config
from trainer.config import config_to_yaml, load_config
from trainer.run_folder.lease import Lease
from trainer.runtime.processes import end_process

pytestmark = pytest.mark.timeout(120)

_OWN: dict[str, Any] = {"model": Network, "samples": Points}


def _process() -> tuple[Any, ...]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    handlers = tuple(map(signal.getsignal, numbers))
    logger = logging.getLogger("shardline")
    outputs = tuple(os.fstat(number).st_ino for number in (1, 2))
    kernels = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    return handlers, list(logger.handlers), logger.level, outputs, kernels, dist.is_initialized()


def test_it_trains_what_a_rank_of_a_command_does_bit_for_bit(tmp_path: Path) -> None:
    before, listener = _process(), Listener()
    given = settings(tmp_path, "python")
    given["deterministic"] = True
    result = train(given, ["launch.threads_per_rank=2"], **_OWN, observers=[listener])
    assert _process() == before
    assert (result.status, result.exit_code, result.step) == ("finished", 0, 6)
    run = Run(result.run_folder)
    assert result.metrics == run.metrics[-1]
    assert run.outcome is not None
    assert run.outcome["status"] == "finished"
    assert (run.path / "report.html").exists()
    assert not (run.path / "lease.json").exists()
    # What was logged, and no more.
    assert listener.steps == [line["step"] for line in run.metrics] == [2, 3, 4, 6]
    assert listener.evaluated == [(3, ["eval/accuracy"]), (6, ["eval/accuracy"])]
    assert listener.saved == [(3, "step-00000003"), (6, "step-00000006")]
    assert list(run.checkpoints) == [3, 6]
    assert run.config.data.factory == "tests.shardline.own_parts:Points"
    # A second one in the same process, and a rank of its own that knows nothing of it.
    again = train(run.config, ["name=again"])
    file = tmp_path / "command.yaml"
    file.write_text(config_to_yaml(load_config(run.config, ["name=command"])))
    trained(run_module("trainer", file))
    curves = [training_curve(tmp_path / "runs" / name) for name in ("python", "again", "command")]
    assert curves[0] == curves[1] == curves[2]
    assert again.metrics["eval/loss"] == result.metrics["eval/loss"]


def test_it_stops_on_request_and_continues_when_it_is_called_again(tmp_path: Path) -> None:
    class Impatient(shardline.Observer):
        def on_step(self, step: int, metrics: Any) -> None:
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    given = settings(tmp_path, "halves", metrics={"every_steps": 1})
    stopped = train(given, **_OWN, observers=[Impatient()])
    assert (stopped.status, stopped.exit_code, stopped.step) == ("stopped", 75, 2)
    run = Run(stopped.run_folder)
    assert run.outcome is not None
    assert run.outcome["reason"] == "stopped by signal SIGTERM; run again to continue"
    finished = train(given, **_OWN)
    assert (finished.status, finished.step) == ("finished", 6)
    # Nothing is left to do; what there is, is told.
    listener = Listener()
    again = train(given, **_OWN, observers=[listener])
    assert (again.status, again.step, again.metrics) == ("finished", 6, finished.metrics)
    assert listener.steps == []
    whole = train(settings(tmp_path, "whole", metrics={"every_steps": 1}), **_OWN)
    assert training_curve(stopped.run_folder) == training_curve(whole.run_folder)
    # A stop that is asked for by the run's folder.
    assert not (run.path / "stop").exists()
    run.stop("a test")
    assert (run.path / "stop").read_text() == "a test\n"


def test_an_observer_that_fails_is_left_out_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clumsy, listener = Clumsy(), Listener()
    result = train(settings(tmp_path, "observed"), **_OWN, observers=[clumsy, listener])
    assert result.status == "finished"
    assert clumsy.steps == [2, 3]
    assert clumsy.evaluated == []
    assert listener.steps == [2, 3, 4, 6]
    sentence = "observer Clumsy failed in on_step after step 3 and is left out from here on: KeyError: 'no such metric'"
    assert capsys.readouterr().out.count(sentence) == 1
    log = (result.run_folder / "logs" / "attempt-1" / "rank-0.log").read_text()
    assert "in on_step\n" in log
    with pytest.raises(UserError, match=r"observers has the class Listener, and no object of it; write Listener\(\)"):
        train(settings(tmp_path, "none"), **_OWN, observers=[Listener])  # type: ignore[list-item]
    with pytest.raises(UserError, match="observers has a str, which would never hear of anything"):
        train(settings(tmp_path, "none"), **_OWN, observers=["wandb"])  # type: ignore[list-item]


def test_errors_are_raised_and_the_process_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = _process()
    given = settings(tmp_path, "fails", data={"arguments": {"fails_at": 50}})
    with pytest.raises(RuntimeError, match="sample 50 cannot be read"):
        train(given, **_OWN)
    assert _process() == before
    run = Run(tmp_path / "runs" / "fails")
    assert run.outcome is not None
    assert (run.outcome["status"], run.outcome["exit_code"]) == ("failed", 1)
    assert "sample 50 cannot be read" in run.outcome["reason"]
    assert not (run.path / "lease.json").exists()
    # Whoever called it says it, in whichever way.
    assert "Traceback" not in capfd.readouterr().err
    train(settings(tmp_path, "first"), **_OWN)
    with pytest.raises(UserError, match=r"holds a run with other settings .*optimizer.lr: frozen 0.03, now 0.01"):
        train(settings(tmp_path, "first", optimizer={"lr": 1e-2}), **_OWN)
    with pytest.raises(UserError, match=r"^the configuration: optimizer.lr=-1"):
        train(given, ["optimizer.lr=-1"], **_OWN)
    lease = Lease.acquire(tmp_path / "runs" / "held")
    with pytest.raises(UserError, match="held"):
        train(settings(tmp_path, "held"), **_OWN)
    lease.release()
    # The same name with what was wrong mended.
    assert train(settings(tmp_path, "fails", data={"arguments": {"fails_at": -1}}), **_OWN).status == "finished"
    assert _process() == before


def test_it_does_not_begin_where_it_could_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[BaseException] = []

    def elsewhere() -> None:
        try:
            train(settings(tmp_path, "thread"), **_OWN)
        except UserError as error:
            raised.append(error)

    thread = threading.Thread(target=elsewhere, name="of a test")
    thread.start()
    thread.join()
    assert "begun in the thread of a test" in str(raised[0])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    at_exit: list[Any] = []
    register = atexit.register
    monkeypatch.setattr(atexit, "register", lambda *given: at_exit.append(given[0]) or register(*given))
    try:
        with pytest.raises(UserError, match="in a process group already"):
            train(settings(tmp_path, "group"), **_OWN)
        assert dist.is_initialized()
        # The process ends as its own code has it.
        assert end_process not in at_exit
    finally:
        dist.destroy_process_group()


def test_a_run_that_continues_says_that_its_code_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = Path(__file__).with_name("own_parts.py").read_text()
    file = tmp_path / "of_a_test.py"
    file.write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    import of_a_test  # type: ignore[import-not-found]

    own = {"model": of_a_test.Network, "samples": of_a_test.Points}
    result = train(settings(tmp_path, "code"), **own)
    provenance = json.loads((result.run_folder / "provenance.json").read_text())
    assert {key: (one["name"], one["file"]) for key, one in provenance["own_code"].items()} == {
        "model.factory": ("of_a_test:Network", str(file)),
        "data.factory": ("of_a_test:Points", str(file)),
    }
    assert "has changed" not in capsys.readouterr().out
    train(settings(tmp_path, "code"), ["steps=8"], **own)
    assert "has changed" not in capsys.readouterr().out
    file.write_text(code + "# Edited.\n")
    train(settings(tmp_path, "code"), ["steps=10"], **own)
    said = capsys.readouterr().out
    assert f"model.factory=of_a_test:Network is in {file}, which has changed since attempt 2" in said


def test_a_file_and_a_task_of_ones_own(tmp_path: Path) -> None:
    given = settings(tmp_path, "file") | {"output_dir": str(tmp_path / "runs"), "data": {"cache_dir": str(tmp_path)}}
    file = write_config(tmp_path / "run.yaml", given)
    config = shardline.load_config(file, ["steps=2"], **_OWN)
    assert (config.model.factory, config.data.source) == ("tests.shardline.own_parts:Network", "factory")
    whole = train(config)
    assert config == load_config(tmp_path / "runs" / "file" / "config.yaml")
    del given["task"]
    halved = train(given, ["name=halved", "steps=2"], **_OWN, task=Halved)
    assert halved.metrics["train/loss"] == pytest.approx(whole.metrics["train/loss"] / 2, rel=1e-2)
    run = Run(halved.run_folder)
    assert run.config.task.name == "tests.shardline.own_parts:Halved"
    # Code runs that the caller names, and no other.
    with pytest.raises(UserError, match=r"asks for Python code by task.name=tests.shardline.own_parts:Halved"):
        run.evaluate("test", model=Network, samples=Points)
    before = _process()
    tested = run.evaluate("test", task=Halved, model=run.config.model.factory, samples=Points)
    assert (tested["samples"], _process()) == (13, before)
