"""Weights & Biases: one run across all attempts, offline where there is no key."""

import json
import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlparse

from trainer.atomic_files import write_atomically
from trainer.config import RunConfig

_Mode = Literal["online", "offline", "disabled", "shared"]
_DEFAULT_SERVER = "https://api.wandb.ai"


class WandbTracker:
    """One wandb run per Shardline run."""

    name = "wandb"

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        """Plan the run; nothing is opened yet."""
        self._config = config
        self._run_dir = run_dir
        self._state_file = run_dir / "wandb" / "shardline.json"
        self._run: Any = None
        self._sent_step = 0
        self._run_id = ""

    def start(self) -> None:
        """Open the wandb run; its identity is kept in the run folder."""
        import wandb

        settings = self._config.tracking.wandb
        saved = self._read_state()
        self._run_id, self._sent_step = saved["run_id"], saved["sent_step"]
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=self._config.name,
            id=self._run_id,
            resume="allow",
            mode=cast(_Mode, wandb_mode(settings.mode, os.environ)),
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

    def _read_state(self) -> dict[str, Any]:
        if self._state_file.exists():
            return json.loads(self._state_file.read_text())
        self._state_file.parent.mkdir(parents=True, exist_ok=True)
        self._run_id = secrets.token_hex(4)
        self._write_state()
        return {"run_id": self._run_id, "sent_step": 0}

    def _write_state(self) -> None:
        write_atomically(self._state_file, json.dumps({"run_id": self._run_id, "sent_step": self._sent_step}))


def wandb_mode(configured: str, environment: Mapping[str, str]) -> str:
    """The mode to use: as configured, then ``$WANDB_MODE``, then online if there is a key and offline if not."""
    if configured != "auto":
        return configured
    if environment.get("WANDB_MODE"):
        return environment["WANDB_MODE"]
    return "online" if _has_key(environment) else "offline"


def _has_key(environment: Mapping[str, str]) -> bool:
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlparse(environment.get("WANDB_BASE_URL", _DEFAULT_SERVER)).hostname or ""
    path = environment.get("NETRC") or str(Path.home() / ".netrc")
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
