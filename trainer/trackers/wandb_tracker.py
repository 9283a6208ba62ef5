"""Weights & Biases: one run across all attempts, offline where there is no key."""

import json
import logging
import netrc
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.atomic_files import write_atomically
from trainer.config import RunConfig

_log = logging.getLogger("shardline")

_WITHOUT_KEY = ("offline", "dryrun", "disabled")


class WandbTracker:
    """One wandb run per Shardline run."""

    name = "wandb"

    def __init__(self, config: RunConfig, run_dir: Path, warn: Callable[[str], None] = _log.warning) -> None:
        """Plan the run; nothing is opened yet.

        Args:
            config: the run.
            run_dir: its folder; wandb's files go to ``wandb`` in it.
            warn: tells a person something that should not be overlooked.
        """
        self._config = config
        self._run_dir = run_dir
        self._warn = warn
        self._state_file = run_dir / "wandb" / "shardline.json"
        self._run: Any = None
        self._sent_step = 0
        self._run_id = ""

    def start(self) -> None:
        """Open the wandb run; its identity is kept in the run folder."""
        import wandb

        settings = self._config.tracking.wandb
        # Before anything else of wandb, which speaks to the terminal as soon as it finds a key.
        server = wandb.setup(wandb.Settings(silent=True)).settings.base_url
        saved = self._read_state()
        self._run_id, self._sent_step = saved["run_id"], saved["sent_step"]
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=self._config.name,
            id=self._run_id,
            resume="allow",
            mode=self._mode(server),
            dir=str(self._run_dir),
            tags=list(settings.tags),
            config=self._config.model_dump(mode="json"),
            # Shardline has its own logs; capturing the console as well would fight over the terminal.
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send a step once: after a crash, steps that are taken again are not sent again."""
        if step <= self._sent_step:
            return
        self._run.log({"step": step, **{name: value for name, value in metrics.items() if value is not None}})
        self._sent_step = step
        self._write_state()

    def finish(self, exit_code: int) -> None:
        """Close the run; one that was stopped on request has not failed."""
        if self._run is not None:
            self._run.finish(exit_code=0 if exit_code in (0, 75) else exit_code)

    def state(self) -> dict[str, Any]:
        """The run's id."""
        return {"run_id": self._run_id}

    def _mode(self, server: str) -> Any:
        configured = self._config.tracking.wandb.mode
        mode = wandb_mode(configured, os.environ, server)
        wanted = configured if configured != "auto" else os.environ.get("WANDB_MODE")
        if mode == "offline" and wanted == "online":
            self._warn(
                f"wandb is to be online, but there is no key for {server}; the run is kept offline in "
                f"{self._run_dir / 'wandb'} (set WANDB_API_KEY or use wandb login before the next attempt)"
            )
        return mode

    def _read_state(self) -> dict[str, Any]:
        if self._state_file.exists():
            return json.loads(self._state_file.read_text())
        self._state_file.parent.mkdir(parents=True, exist_ok=True)
        self._run_id = secrets.token_hex(4)
        self._write_state()
        return {"run_id": self._run_id, "sent_step": 0}

    def _write_state(self) -> None:
        write_atomically(self._state_file, json.dumps({"run_id": self._run_id, "sent_step": self._sent_step}))


def wandb_mode(configured: str, environment: Mapping[str, str], server: str) -> str:
    """The mode to use: as configured, then ``$WANDB_MODE``; without a key never one that would ask for it.

    Args:
        configured: ``tracking.wandb.mode``.
        environment: the environment variables.
        server: address of the wandb server.
    """
    wanted = configured if configured != "auto" else environment.get("WANDB_MODE") or "online"
    return wanted if wanted in _WITHOUT_KEY or _has_key(environment, server) else "offline"


def _has_key(environment: Mapping[str, str], server: str) -> bool:
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = Path(environment.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(path).authenticators(urlsplit(server).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False
