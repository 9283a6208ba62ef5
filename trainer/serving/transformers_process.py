"""``transformers serve`` as a process of ours: on loopback, offline, and never alive without us.

``python -m trainer.serving.transformers_process FOLDER PORT`` is that process.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx

from sharding.ranks.errors import RunFailure
from sharding.ranks.local_group import free_port

LOOPBACK = "127.0.0.1"
_START_S = 180.0
_POLL_S = 0.1
_END_S = 2.0
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class TransformersProcess:
    """The process, from its start to its end."""

    def __init__(self, folder: Path, log: Path) -> None:
        """Start it; it loads the model before it answers.

        Args:
            folder: the model, as ``from_pretrained`` loads it.
            log: file of what it says.
        """
        self._log = log
        port = free_port()
        self.url = f"http://{LOOPBACK}:{port}"
        with log.open("wb") as output:
            # A session of its own: Ctrl-C at a terminal is not to reach it while answers are on their way.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer.serving.transformers_process", str(folder), str(port)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_OFFLINE},
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Wait until it answers.

        Raises:
            RunFailure: it ends before, or takes too long.
        """
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RunFailure(f"transformers serve ended with status {self.process.returncode}: {self.last_words()}")
            try:
                if httpx.get(f"{self.url}/health", timeout=_POLL_S, trust_env=False).is_success:
                    return
            except httpx.HTTPError:
                time.sleep(_POLL_S)
        raise RunFailure(f"transformers serve did not answer within {_START_S:g} s: {self.last_words()}")

    def last_words(self) -> str:
        """The last line that it said."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def end(self) -> None:
        """End it; it may be writing a long text, which nobody waits for any more."""
        self.process.terminate()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main(arguments: list[str]) -> None:
    """Become ``transformers serve``."""
    from sharding.ranks.process_lifetime import die_with_parent

    die_with_parent()
    # The library's own command, without its look for a newer release of itself.
    from transformers.cli.transformers import app

    folder, port = arguments
    app(["serve", folder, "--host", LOOPBACK, "--port", port, "--log-level", "error"])


if __name__ == "__main__":
    main(sys.argv[1:])
