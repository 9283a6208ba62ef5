"""docs/deployment.md as a reader types it, from raw files to answers over HTTP: in full, and on a smaller scale."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sharding.ranks.local_group import free_port
from tests.doc_pages import Page
from tests.support import ROOT, command_environment, from_zygote, wait_until

PAGE = ROOT / "docs" / "deployment.md"
_SMALL_QUICKSTART = ("steps=2", "data.max_documents=60", "data.vocab_size=512", "evaluation.every_steps=0")


class _Reader:
    """Somebody who types commands in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment = command_environment(SHARDLINE_CACHE=str(folder / "cache"), WANDB_MODE="disabled")
        self._ports: dict[str, str] = {}
        for name, text in Page.read(PAGE).files.items():
            (folder / name).write_text(text)

    def types(self, words: Sequence[str], *more: str) -> str:
        """Run a command to its end; returns what it printed."""
        program, *arguments = words
        arguments = [re.sub(r"(?<=127\.0\.0\.1:)\d+", lambda port: self._ports[port[0]], text) for text in arguments]
        command = {"shardline": [sys.executable, "-m", "launcher"], "python": [sys.executable]}.get(program, [program])
        with from_zygote():
            finished = subprocess.run(
                [*command, *arguments, *more],
                cwd=self.folder,
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=400,
                check=False,
            )
        assert finished.returncode == 0, f"{words}\n{finished.stdout}{finished.stderr}"
        return finished.stdout

    def serves(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start ``shardline serve`` at a free port in place of the page's, and wait until it is ready."""
        port = str(free_port())
        self._ports[words[words.index("--port") + 1]] = port
        arguments = [*words[1 : words.index("--port")], "--port", port]
        log = self.folder / f"serve-{port}.log"
        with log.open("wb") as output, from_zygote():
            server = subprocess.Popen(
                [sys.executable, "-m", "launcher", *arguments],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        asked = ["curl", "--silent", "--fail", "--output", "/dev/null", f"http://127.0.0.1:{port}/ready"]

        def is_ready() -> bool:
            assert server.poll() is None, log.read_text()
            return subprocess.run(asked, check=False).returncode == 0

        wait_until(is_ready, 200, f"{arguments} being ready")
        return server

    def predicted(self, page_command: Sequence[str]) -> dict[str, str]:
        """The class of each image that was kept aside, as the page's own command asks for it."""
        found = {}
        for image in sorted((self.folder / "new").glob("*.png")):
            words = [re.sub(r"@new/.*", f"@new/{image.name}", word) for word in page_command]
            (prediction,) = json.loads(self.types(words))["predictions"]
            assert sum(prediction["probabilities"].values()) == pytest.approx(1, abs=1e-4)
            found[image.stem] = prediction["class"]
        return found


def _ends(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 0


def _accuracy(printed: str) -> float:
    return float(re.search(r"accuracy\D*(\d\.\d+)", printed)[1])  # type: ignore[index]


def _num_right(predicted: dict[str, str]) -> int:
    return sum(name == label for name, label in predicted.items())


def test_an_image_is_answered_for_by_the_exported_network(tmp_path: Path) -> None:
    reader = _Reader(tmp_path)
    commands = Page.read(PAGE).commands()
    export, serve = (next(words for words in commands if words[1] == verb) for verb in ("export", "serve"))
    (ask,) = (words for words in commands if words[0] == "curl" and "--data-binary" in words)
    reader.types(["python", "raw_files.py"])
    alone = ["distill.teacher=null", "steps=60", "schedule.warmup_steps=6", "evaluation.every_steps=0"]
    reader.types(["shardline", "run", "student.yaml", "name=pruned", *alone], "--nproc-per-node", "1")
    reader.types(export)
    server = reader.serves([*serve[:2], "model", *serve[3:]])
    predicted = reader.predicted(ask)
    _ends(server)
    assert set(predicted) == set("0123456789")
    assert _num_right(predicted) >= 7


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_command_works_in_its_place(tmp_path: Path) -> None:
    reader = _Reader(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    servers, accuracies, answered = [], [], {}
    for words in Page.read(PAGE).commands():
        if words[0] == "pip":
            continue
        if words[:2] == ["shardline", "serve"]:
            servers.append(reader.serves(words))
        elif words[0] == "curl" and "--data-binary" in words:
            answered = reader.predicted(words)
        elif "runs/quickstart" in words:
            # The page takes it for granted.
            reader.types(["shardline", "run", "configs/quickstart.yaml", *_SMALL_QUICKSTART])
            reader.types(words)
        else:
            printed = reader.types(words)
            if words[1] == "evaluate":
                accuracies.append(_accuracy(printed))
    for server in servers:
        _ends(server)
    teacher, student, pruned = accuracies
    assert teacher > 0.97
    assert min(student, pruned) > 0.95
    assert _num_right(answered) >= 8
