"""trackio: a dashboard on this machine, one trackio run across all attempts, never a server."""

import contextlib
import io
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import RunConfig
from trainer.files.atomic_files import write_atomically


class TrackioTracker:
    """One trackio run per Shardline run, in ``$TRACKIO_DIR`` or in the run's folder."""

    name = "trackio"

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        """Plan the run; nothing is opened yet.

        Args:
            config: the run.
            run_dir: its folder.
        """
        self._config = config
        self._folder = run_dir / "trackio"
        self._state_file = self._folder / "shardline.json"
        self._run: Any = None
        self._run_id = ""
        self._sent_step = 0

    def start(self, step: int) -> None:
        """Open the trackio run; its identity is kept in the run folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        saved = json.loads(self._state_file.read_text()) if self._state_file.exists() else {}
        self._run_id = saved.get("run_id") or uuid.uuid4().hex
        # trackio reads it at its import.
        os.environ.setdefault("TRACKIO_DIR", str(self._folder.absolute()))
        from trackio import Run
        from trackio.sqlite_storage import SQLiteStorage

        class LocalRun(Run):
            """Without the question to the hub who the owner of a token is."""

            def _get_username(self) -> None:
                return None

        project = self._config.tracking.trackio.project
        # trackio writes twice a second, so a killed attempt may have left less than was sent: what is in its database
        # counts, and the rest is sent again from metrics.jsonl.
        in_database = SQLiteStorage.get_max_step_for_run(project, run_id=self._run_id) or 0
        self._sent_step = max(in_database, saved.get("sent_step", 0))
        self._write_state(saved.get("sent_step", 0))
        # trackio.init would take $TRACKIO_SPACE_ID for a server to send to, and print advice over our console.
        self._run = LocalRun(
            url=None,
            project=project,
            client=None,
            name=self._config.name,
            run_id=self._run_id,
            config=self._config.model_dump(mode="json"),
        )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send a step once: after a crash, steps that are taken again are not sent again."""
        if step > self._sent_step:
            self._run.log({name: value for name, value in metrics.items() if value is not None}, step=step)
            self._sent_step = step

    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        """Wait until everything is in the database. trackio has no place for a summary."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()
        self._write_state(self._sent_step)

    def state(self) -> dict[str, Any]:
        """The run's id."""
        return {"run_id": self._run_id} if self._run_id else {}

    def _write_state(self, sent_step: int) -> None:
        write_atomically(self._state_file, json.dumps({"run_id": self._run_id, "sent_step": sent_step}))
