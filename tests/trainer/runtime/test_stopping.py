"""Requests to stop reach a rank by signal or by file."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.run_folder.folder import RunFolder
from trainer.runtime import stopping
from trainer.runtime.stopping import StopRequest

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture
def stop_request() -> Iterator[StopRequest]:
    """With handlers installed, and the test's own put back after it."""
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    request = StopRequest()
    request.install_handlers()
    yield request
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_asks_and_ends_nothing(stop_request: StopRequest, number: int) -> None:
    assert not stop_request.poll(None)
    os.kill(os.getpid(), number)
    assert stop_request.poll(None)


def test_a_hangup_that_is_ignored_stays_so() -> None:
    """As ``nohup`` has it."""
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        request = StopRequest()
        request.install_handlers()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not request.poll(None)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@pytest.mark.timing
def test_a_second_interrupt_is_at_once(stop_request: StopRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_SAME_INTERRUPT_S", 0.05)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_torchrun_repeats_counts_once(stop_request: StopRequest) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop_request.poll(None)


def test_the_file_is_looked_for_at_most_every_half_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    request, stop_file = StopRequest(), tmp_path / "stop"
    assert not request.poll(stop_file)
    RunFolder(tmp_path).request_stop("enough")
    assert stop_file.read_text() == "enough\n"
    now[0] += 0.4
    assert not request.poll(stop_file)
    now[0] += 0.2
    assert request.poll(stop_file)
    stop_file.unlink()
    assert request.poll(stop_file)
