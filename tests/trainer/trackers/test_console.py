"""What a person sees of a run: on a terminal, in a file, and when nobody reads any more."""

import contextlib
import io
import logging
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from tests.support import ROOT, command_environment
from trainer.trackers.console import Console

METRICS = {
    "train/loss": 4.12345,
    "train/learning_rate": 1.9e-3,
    "train/grad_norm": 1.019,
    "train/skipped_steps": 0,
    "throughput/tokens_per_s": 12345.6,
    "throughput/mfu": None,
}


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="shardline"):
        yield caplog


class Terminal:
    """A pseudo-terminal: what is written to ``stream`` is what a person would see."""

    def __init__(self) -> None:
        self._reader, writer = pty.openpty()
        self.stream: TextIO = os.fdopen(writer, "w")

    def read(self) -> str:
        """What was written since the last time, without control sequences."""
        self.stream.flush()
        seen = b""
        while select.select([self._reader], [], [], 0.2)[0]:
            seen += os.read(self._reader, 1 << 16)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())

    def hang_up(self) -> None:
        """Close the reading side, as a terminal window does."""
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1

    def close(self) -> None:
        """Close both sides."""
        self.hang_up()
        with contextlib.suppress(OSError):
            self.stream.close()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    with contextlib.closing(Terminal()) as opened:
        yield opened


def test_plain_lines_where_there_is_no_terminal(records: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    console = Console(600, stream)
    console.start(0)
    console.advance(119)
    console.log_metrics(120, METRICS)
    console.close()
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("step 120/600  loss 4.1235  lr 1.90e-03  grad 1.02  12,346 tokens/s  left ")
    assert records.messages == [line]


def test_where_samples_are_no_tokens_their_rate_is_said() -> None:
    stream = io.StringIO()
    Console(600, stream, unit="samples").log_metrics(120, METRICS)
    assert "  12,346 samples/s  left " in stream.getvalue()


def test_what_is_unknown_or_rare_is_shown_only_where_it_matters() -> None:
    stream = io.StringIO()
    console = Console(600, stream)
    console.log_metrics(3, METRICS | {"train/loss": None, "throughput/mfu": 0.4321, "train/skipped_steps": 2})
    assert "loss n/a" in stream.getvalue()
    assert "MFU 43.2%" in stream.getvalue()
    assert "skipped 2" in stream.getvalue()


def test_evaluation_has_a_line_of_its_own(records: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    console = Console(600, stream)
    console.log_metrics(200, METRICS | {"eval/loss": 3.91, "eval/perplexity": 49.9, "eval/f1/cat": 0.5})
    assert stream.getvalue().splitlines()[1] == "step 200  evaluation  loss 3.9100  perplexity 49.9000"
    assert records.messages[1] == "step 200  evaluation  loss 3.9100  perplexity 49.9000"


def test_messages_are_shown_as_they_are_and_logged(records: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    console = Console(600, stream)
    text = "saved runs/[bold]x[/bold]/:smile:/" + 30 * "long-name-"
    console.info(text)
    console.warning("mind this")
    assert stream.getvalue() == f"{text}\nwarning: mind this\n"
    assert [(record.levelname, record.message) for record in records.records] == [
        ("INFO", text),
        ("WARNING", "mind this"),
    ]


def test_one_live_line_on_a_terminal(records: pytest.LogCaptureFixture, terminal: Terminal) -> None:
    console = Console(600, terminal.stream)
    console.start(100)
    assert "step 100/600" in terminal.read()
    console.log_metrics(120, METRICS)
    console.advance(600)
    seen = terminal.read()
    assert "step 600/600" in seen
    assert "loss 4.1235" in seen
    # The line is drawn over itself: none that is left behind, and the metrics are in the log all the same.
    assert "\n" not in seen
    assert records.messages[0].startswith("step 120/600  loss 4.1235")
    console.info("saved runs/x")
    assert re.search(r"saved runs/x\s*\n", terminal.read())
    console.close()
    assert terminal.read().endswith("\n")


@pytest.mark.parametrize(
    ("columns", "shown", "left_out", "has_bar"),
    [
        ("160", ["loss 4.1235", "lr 1.90e-03", "grad 1.02", "12,346 tokens/s", "MFU 43.2%", "left "], [], True),
        ("80", ["loss 4.1235", "12,346 tokens/s", "left "], ["lr ", "grad", "MFU"], True),
        ("60", ["loss 4.1235", "left "], ["tokens/s"], True),
        ("42", ["loss 4.1235", "left "], ["tokens/s"], False),
        ("24", ["loss"], ["tokens/s"], False),
    ],
)
def test_the_line_keeps_what_matters_in_few_columns(
    monkeypatch: pytest.MonkeyPatch,
    terminal: Terminal,
    columns: str,
    shown: list[str],
    left_out: list[str],
    has_bar: bool,
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    console = Console(30000, terminal.stream)
    console.start(1200)
    terminal.read()
    console.log_metrics(1234, METRICS | {"throughput/mfu": 0.4321})
    seen = terminal.read()
    lines = [line for line in seen.replace("\r", "\n").splitlines() if line.strip()]
    line = lines[-1]
    assert line.startswith("step 1234/30000")
    # One that is wrapped cannot be drawn over.
    assert all(len(one) <= int(columns) for one in lines)
    assert [text for text in shown if text not in line] == []
    assert [text for text in left_out if text in line] == []
    assert ("\u2501" in line) == has_bar
    console.close()


def test_a_finished_run_shows_no_bar(terminal: Terminal) -> None:
    console = Console(600, terminal.stream)
    console.start(600)
    console.info("nothing to do")
    console.close()
    assert terminal.read().split() == ["nothing", "to", "do"]


def test_training_goes_on_when_nobody_reads(tmp_path: Path) -> None:
    log, script = (
        tmp_path / "log",
        f"""
import logging, sys
from tests.support import ROOT, command_environment
from trainer.trackers.console import Console

logging.basicConfig(filename={str(tmp_path / "log")!r}, level=logging.INFO, format="%(message)s")
console = Console(600)
console.start(0)
for step in range(1, 4):
    sys.stdin.readline()
    console.log_metrics(step, {METRICS!r})
console.close()
sys.stdout.flush()
sys.exit(75)
""",
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=command_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith("step 1/600")
        # As in `shardline run ... | head -1`.
        process.stdout.close()
        process.stdin.write("\n\n")
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 75
    assert [line.split("  ")[0] for line in log.read_text().splitlines()] == ["step 1/600", "step 2/600", "step 3/600"]


def test_training_goes_on_when_the_terminal_is_closed(records: pytest.LogCaptureFixture, terminal: Terminal) -> None:
    console = Console(600, terminal.stream)
    console.start(0)
    terminal.hang_up()
    console.log_metrics(1, METRICS)
    console.info("second")
    console.close()
    assert len(records.messages) == 2


def test_a_closed_stream_is_no_error(records: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    stream.close()
    console = Console(600, stream)
    console.info("unseen")
    console.close()
    assert records.messages == ["unseen"]
