"""Weights & Biases: one run across all attempts, offline where there is no key."""

import json
import logging
import netrc
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sharding.ranks.errors import EXIT_FINISHED, EXIT_STOPPED
from trainer.config import RunConfig
from trainer.files.atomic_files import write_atomically
from trainer.metrics.class_table import CONFUSION_NAME, read_confusion
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.listing import MANIFEST_NAME
from trainer.trackers.wandb_files import ATTEMPT_KEY, WandbPart, read_parts

_log = logging.getLogger("shardline")

FINISH_TIMEOUT_S = 50.0
"""How long wandb may send what is left at a run's end, and once more at the process's; the rest stays on disk."""

_WITHOUT_KEY = ("offline", "dryrun", "disabled")


@dataclass(frozen=True)
class WandbIdentity:
    """The wandb run of a Shardline run, kept in its folder.

    Attributes:
        run_id: wandb's id, the same in all attempts.
        sent_step: last step that is certain to be with wandb.
    """

    run_id: str
    sent_step: int

    @classmethod
    def read(cls, run_dir: Path) -> "WandbIdentity | None":
        """What an earlier attempt has written; None where none did."""
        try:
            values = json.loads(_identity_file(run_dir).read_text())
        except FileNotFoundError:
            return None
        return cls(values["run_id"], values["sent_step"])

    def write(self, run_dir: Path) -> None:
        """Keep it for later attempts."""
        file = _identity_file(run_dir)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(asdict(self)))


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
        self._run: Any = None
        self._is_online = False
        self._identity = WandbIdentity("", 0)

    def start(self, step: int) -> None:
        """Open the wandb run; its identity is kept in the run folder."""
        self._identity = WandbIdentity.read(self._run_dir) or WandbIdentity(secrets.token_hex(4), 0)
        self._identity.write(self._run_dir)
        import wandb

        settings = self._config.tracking.wandb
        # Before anything else of wandb, which speaks to the terminal as soon as it finds a key.
        server = wandb.setup(wandb.Settings(silent=True)).settings.base_url
        mode = self._mode(server)
        self._is_online = mode not in _WITHOUT_KEY
        # Before this attempt adds one.
        parts = read_parts(self._run_dir, self._identity.run_id)
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=self._config.name,
            id=self._identity.run_id,
            resume="allow",
            mode=mode,
            dir=str(self._run_dir),
            tags=list(settings.tags),
            group=settings.group,
            notes=settings.notes,
            config=self._config.model_dump(mode="json") | {ATTEMPT_KEY: RunFolder(self._run_dir).newest_attempt()},
            settings=_run_settings(wandb.Settings),
        )
        self._identity = replace(self._identity, sent_step=self._find_sent_step(parts))
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send a step once: after a crash, steps that are taken again are not sent again."""
        if step <= self._identity.sent_step:
            return
        values = {name: value for name, value in metrics.items() if value is not None}
        # By our step, since wandb's own counter would start at 0 in each offline part and joined parts would overlap;
        # with commit, since wandb would hold the line back until the next step.
        self._run.log({"step": step, **values}, step=step, commit=True)
        self._identity = replace(self._identity, sent_step=step)
        if self._is_online:
            self._identity.write(self._run_dir)

    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        """Close the run; one that was stopped on request has not failed."""
        self._run.summary.update(dict(summary))
        if (rows := read_confusion(self._run_dir)) is not None:
            import wandb

            # No curve, and so no part of any step: that of the last evaluation is left.
            self._run.summary[CONFUSION_NAME] = wandb.Table(columns=["class", *(row[0] for row in rows)], data=rows)
        if self._config.tracking.wandb.artifacts:
            self._log_artifact()
        try:
            self._run.finish(exit_code=0 if exit_code in (EXIT_FINISHED, EXIT_STOPPED) else exit_code)
        except TimeoutError:
            self._warn(f"wandb did not finish within {FINISH_TIMEOUT_S:g} s; what is lacking is in metrics.jsonl")
        # Offline, only now is it certain that everything is on disk.
        self._identity.write(self._run_dir)

    def state(self) -> dict[str, Any]:
        """The run's id."""
        return {"run_id": self._identity.run_id} if self._identity.run_id else {}

    def _find_sent_step(self, parts: Sequence[WandbPart]) -> int:
        """The last step that is with wandb; what a killed attempt took for sent need not have arrived.

        wandb writes its files, and sends, with a delay. What is on disk counts, or what the server has; the rest is
        sent again from metrics.jsonl.
        """
        if not self._is_online:
            return max([self._identity.sent_step, *(part.last_step for part in parts)])
        waiting = [part.last_step for part in parts if part.is_waiting]
        if waiting:
            self._warn(
                f"wandb is online now, but {len(waiting)} offline parts of this run are not uploaded; "
                f"stop, run shardline tracking sync {self._run_dir} and continue, to have its steps in order"
            )
        # Steps are wandb's own here, see log().
        return max([self._run.starting_step - 1, 0, *waiting])

    def _log_artifact(self) -> None:
        import wandb

        artifact = wandb.Artifact(f"{self._config.name}-{self._identity.run_id}", type="run")
        patterns = ("config*.yaml", "provenance*.json", "metrics.jsonl")
        for path in (file for pattern in patterns for file in sorted(self._run_dir.glob(pattern))):
            artifact.add_file(str(path), name=path.name)
        newest = RunFolder(self._run_dir).newest_checkpoint()
        if newest is not None:
            with artifact.new_file(f"checkpoints/{newest[1].name}/{MANIFEST_NAME}", "wb") as file:
                file.write((newest[1] / MANIFEST_NAME).read_bytes())
        self._run.log_artifact(artifact)

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


def _run_settings(kind: Any) -> Any:
    """What wandb is told of this one run, as its class of settings."""
    # Shardline has its own logs; capturing the console as well would fight over the terminal.
    settings = {"console": "off", "silent": True}
    # Without one its hook at the interpreter's end would hold a script whose server is away; old releases have none.
    has_limit = "finish_timeout" in kind.model_fields
    limit = {"finish_timeout": FINISH_TIMEOUT_S, "finish_timeout_raises": True} if has_limit else {}
    return kind(**settings, **limit)


def has_key(environment: Mapping[str, str], server: str) -> bool:
    """Whether there is a key for a server: in the environment, or in netrc as ``wandb login`` leaves it there."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = Path(environment.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(path).authenticators(urlsplit(server).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb_mode(configured: str, environment: Mapping[str, str], server: str) -> str:
    """The mode to use: as configured, then ``$WANDB_MODE``; without a key never one that would ask for it.

    Args:
        configured: ``tracking.wandb.mode``.
        environment: the environment variables.
        server: address of the wandb server.
    """
    wanted = configured if configured != "auto" else environment.get("WANDB_MODE") or "online"
    return wanted if wanted in _WITHOUT_KEY or has_key(environment, server) else "offline"


def _identity_file(run_dir: Path) -> Path:
    return run_dir / "wandb" / "shardline.json"
